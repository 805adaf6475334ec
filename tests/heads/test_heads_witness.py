"""Head scores beside TransformerLens's detectors, read off transformers' own attention: no code is shared."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from attnlab import pretrained
from attnlab.heads import head_scores, repeated

SEGMENT, SEQUENCES, LAYERS, HEADS = 11, 6, 2, 4


def test_scores_agree_with_transformer_lens(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    detector = pytest.importorskip("transformer_lens.head_detector")
    torch.manual_seed(3)
    config = transformers.GPT2Config(
        vocab_size=60,
        n_positions=32,
        n_embd=32,
        n_layer=LAYERS,
        n_head=HEADS,
        initializer_range=0.4,
        bos_token_id=0,
        eos_token_id=0,
    )
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path / "gpt2")
    ours = pretrained.load(tmp_path / "gpt2").model
    scores = head_scores(ours, sequences=SEQUENCES, segments=[SEGMENT]).scores
    theirs.set_attn_implementation("eager")
    length = 2 * SEGMENT
    counted = {"previous token": length - 1, "duplicate token": SEGMENT, "induction": SEGMENT}  # queries with a target
    patterns = {
        "previous token": detector.get_previous_token_head_detection_pattern,
        "duplicate token": detector.get_duplicate_token_head_detection_pattern,
        "induction": detector.get_induction_head_detection_pattern,
    }
    found = {name: torch.zeros(LAYERS, HEADS) for name in patterns}
    for row in repeated(60, SEQUENCES, SEGMENT, 0):
        with torch.no_grad():
            maps = theirs(row[None], output_attentions=True).attentions
        for name, pattern in patterns.items():
            wanted = pattern(row[None])
            for layer in range(LAYERS):
                for head in range(HEADS):
                    share = detector.compute_head_attention_similarity_score(
                        maps[layer][0, head].clone(),
                        wanted,
                        exclude_bos=False,
                        exclude_current_token=False,
                        error_measure="mul",
                    )  # of all attention, where ours is per query that has something to look at
                    found[name][layer, head] += share * length / counted[name] / SEQUENCES
    for name, expected in found.items():
        assert expected.max() > 1.5 * expected.min(), "weights this large make heads that differ"
        torch.testing.assert_close(torch.tensor(scores[name], dtype=torch.float32), expected, atol=1e-5, rtol=0)
