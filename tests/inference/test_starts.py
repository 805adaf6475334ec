"""The tokens that stand before a text: transformers is the witness."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from attnlab import data, pretrained
from attnlab.cli.convert import _texts
from attnlab.config import ModelConfig
from attnlab.data import bpe
from attnlab.errors import UserError
from attnlab.evaluation.perplexity import evaluate, evaluate_source
from attnlab.inference.generate import Sampling, generate
from attnlab.inference.text import continue_texts
from attnlab.model import Decoder

FIRST, LAST = "<s>", "</s>"
TEXT = "plain words, and then some more plain words.\n"
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


@pytest.fixture(scope="module")
def words() -> bpe.BPETokenizer:
    pytest.importorskip("tokenizers", reason="tokenizers is not installed: pip install 'attnlab[data]'")
    return bpe.train_bpe([TEXT] * 20, 280, [FIRST, LAST])


def template(ids: dict[str, int], *parts: str) -> dict[str, Any]:
    def part(name: str) -> dict[str, Any]:
        if name in ids:
            return {"SpecialToken": {"id": name, "type_id": 0}}
        return {"Sequence": {"id": name, "type_id": 0}}

    special = {name: {"id": name, "ids": [i], "tokens": [name]} for name, i in ids.items() if name in parts}
    pair = [part("A"), part("B")]
    return {
        "type": "TemplateProcessing",
        "single": [part(name) for name in parts],
        "pair": pair,
        "special_tokens": special,
    }


def processors(ids: dict[str, int]) -> dict[str, Any]:
    """Post-processors of a tokenizer.json, by name."""
    cls, sep = ([name, ids[name]] for name in (FIRST, LAST))
    return {
        "none": None,
        "bytes": BYTES,
        "first": template(ids, FIRST, "A"),
        "twice": template(ids, FIRST, FIRST, "A"),
        "both": template(ids, FIRST, "A", LAST),
        "last": template(ids, "A", LAST),
        "several": {"type": "Sequence", "processors": [BYTES, template(ids, FIRST, "A")]},
        "roberta": {
            "type": "RobertaProcessing",
            "sep": sep,
            "cls": cls,
            "trim_offsets": True,
            "add_prefix_space": False,
        },
        "bert": {"type": "BertProcessing", "sep": sep, "cls": cls},
    }


CASES = {"none": 0, "bytes": 0, "first": 1, "twice": 2, "both": 1, "last": 0, "several": 1, "roberta": 1, "bert": 1}


def saved(words: bpe.BPETokenizer, case: str, folder: Any) -> pretrained.Loaded:
    """A model whose tokenizer has the post-processor `case`, written and read again."""
    held = words.to_json()
    ids = {token["content"]: token["id"] for token in held["added_tokens"]}
    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        model = Decoder(ModelConfig(vocab_size=words.vocab_size, context=24, n_layers=2, d_model=32, n_heads=4)).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
    tokenizer = data.from_json({**held, "post_processor": processors(ids)[case]})
    source = pretrained.Loaded(model, tokenizer, "here", "attnlab", {"config": dict.fromkeys(pretrained.TOKENS)})
    return pretrained.load(pretrained.save(source, folder))


@pytest.mark.parametrize("case", CASES)
def test_a_prompt_begins_as_in_transformers(case, words, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    loaded = saved(words, case, tmp_path / "model")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    for text in ("plain words", "", f"a {FIRST} in it"):
        own = [*loaded.tokenizer.starts, *loaded.tokenizer.encode(text)]
        ends = loaded.tokenizer.to_json()["added_tokens"][2]["id"]
        wanted = theirs(text, split_special_tokens=True)["input_ids"]
        assert own == wanted[: len(own)] and set(wanted[len(own) :]) <= {ends}
    assert len(loaded.tokenizer.starts) == CASES[case]
    settings = Sampling(9, 1.0, seed=2)
    ids = [*loaded.tokenizer.starts, *words.encode("plain words")]
    found = continue_texts(loaded, ["plain words"], settings)
    rows = generate(loaded.model, [ids], 9, temperature=1.0, seed=2, stop=set(loaded.tokenizer.ends))
    assert found.texts == [loaded.tokenizer.decode(row) for row in rows] and found.prompt_tokens == len(ids)


def test_an_empty_prompt_has_a_first_token_where_there_is_one(words, tmp_path):
    assert continue_texts(saved(words, "first", tmp_path / "first"), [""], Sampling(3)).prompt_tokens == 1
    with pytest.raises(UserError, match="prompt 1 is empty"):
        continue_texts(saved(words, "bytes", tmp_path / "bytes"), [""], Sampling(3))


def test_a_chat_has_what_its_template_says_and_no_more(words, tmp_path):
    loaded = saved(words, "first", tmp_path / "model")
    chat = replace(loaded, about={**loaded.about, "chat_template": "{{ messages[0].content }}"})
    assert continue_texts(chat, ["plain"], Sampling(3), chatting=True).prompt_tokens == len(words.encode("plain"))


@pytest.mark.parametrize("case", ["bytes", "first", "twice"])
def test_windows_of_a_conversion_begin_alike(case, words, tmp_path):
    loaded = saved(words, case, tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT * 60)
    starts = list(loaded.tokenizer.starts)
    for batches in _texts(loaded, f"text:{tmp_path / 'text.txt'}", 2, None, 0).values():
        for batch in batches:
            assert batch.shape == (8, 24) and batch[:, : len(starts)].tolist() == [starts] * 8
            assert all(loaded.tokenizer.decode(row) in TEXT * 60 for row in batch[:, len(starts) :].tolist())
    with pytest.raises(
        UserError, match=f"hold 0 of the text: give --context {len(starts) + 2}" if starts else "hold 1"
    ):
        _texts(loaded, f"text:{tmp_path / 'text.txt'}", 2, max(len(starts), 1), 0)


def test_a_document_is_evaluated_after_the_first_token(words, tmp_path):
    loaded = saved(words, "first", tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    found = evaluate_source(tmp_path / "model", f"text:{tmp_path / 'text.txt'}")
    first = loaded.tokenizer.starts[0]
    assert found.loss == evaluate(loaded.model, [words.encode(TEXT)], tokenizer=words, front=first).loss
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "bos_token_id": 7}))
    assert pretrained.load(tmp_path / "model").front == 7
