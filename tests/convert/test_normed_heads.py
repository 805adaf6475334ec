"""Latents made of heads that are normed first: conversion of Qwen3."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import CONVERTED as SHAPE
from helpers import batches, grown

from attnlab import pretrained
from attnlab.attention import gla, mla
from attnlab.config import ModelConfig, from_dict, to_dict
from attnlab.convert import convert
from attnlab.errors import UserError
from attnlab.inference.generate import generate
from attnlab.laws import check_attention
from attnlab.model import Decoder, attention_configs


def source(positions: str = "rope", **options: object) -> Decoder:
    """Return a grown gqa, with these fields of its Config."""
    return grown(replace(SHAPE, mechanisms=("gqa",), positions=positions, options={"gqa": options}))


TEXT = {"calibration": batches(), "held_out": batches(1, 7)}
NORMED = [
    {"n_kv_heads": 2, "qk_norm": 1e-6},
    {"n_kv_heads": 4, "qk_norm": 1e-2},
    {"n_kv_heads": 2, "qk_norm": 1e-6, "bias": True, "o_bias": False},
]


@pytest.mark.parametrize("positions", ["rope", "learned"])
@pytest.mark.parametrize("method", ["svd", "aware"])
@pytest.mark.parametrize("options", NORMED)
def test_norms_of_heads_stay_before_the_latent(options, method, positions):
    """At full rank nothing is lost, and the cache is no larger than the source's; with every rank less is lost."""
    model = source(positions, **options)
    new, found = convert(model, "mla", method=method, **TEXT)
    assert found.exact and found.cache_share == 1.0
    errors = [convert(model, "mla", rank=r, method=method, **TEXT)[1].layer_errors[0] for r in (2, 8, 2 * 4 * 6)[:2]]
    assert 1.1 > errors[0] > errors[1] > 0 or errors[1] < 1e-6
    again = Decoder(from_dict(ModelConfig, to_dict(new.config)))
    again.load_state_dict(new.state_dict())
    texts = [[1, 2, 3], [4, 5, 6, 7, 8]]
    assert generate(new, texts, 8, temperature=0) == generate(model, texts, 8, temperature=0)


def test_text_helps_where_heads_have_norms():
    model = source(**NORMED[0])
    plain, aware = (convert(model, "mla", rank=6, method=m, **TEXT)[1].layer_errors for m in ("svd", "aware"))
    assert all(b < a for a, b in zip(plain, aware, strict=True)) and sum(aware) < 0.9 * sum(plain)


@pytest.mark.parametrize("method", ["svd", "aware"])
def test_latents_of_normed_heads_get_a_lower_rank(method):
    new, _ = convert(source(**NORMED[2]), "mla", **TEXT)
    rank = attention_configs(new.config)[0].kv_rank
    errors = [convert(new, "mla", rank=r, method=method, **TEXT)[1].layer_errors[0] for r in (2, rank // 2, rank)]
    assert errors[0] > errors[1] > 0.01 and errors[2] < 1e-9


def test_norms_of_heads_become_sparse_latents():
    model = source(**NORMED[2])
    assert convert(model, "msla", options={"top_k": 21}, **TEXT)[1].exact
    new, _ = convert(model, "mla", rank=0.5, per_layer=True, **TEXT)
    laws = ["causality", "batch independence", "chunks", "left padding", "plain path"]
    for result in check_attention(new.blocks()[0].attention, laws=laws):
        assert result.status in ("holds", "n/a"), result


@pytest.mark.parametrize("rope_dim", [0, 8])
def test_normed_heads_obey_every_law(rope_dim):
    config = mla.Config(from_heads=2, head_eps=1e-5, bias=True, rope_dim=rope_dim, norm="none")
    results = check_attention(mla.Attention(config))
    assert not [result for result in results if result.status not in ("holds", "n/a")]
    with pytest.raises(UserError, match="from_heads is 3: give a divisor of n_heads, 4, and leave out q_rank"):
        mla.Config(from_heads=3)
    with pytest.raises(UserError, match="leave out q_rank"):
        mla.Config(from_heads=2, q_rank=8)
    with pytest.raises(UserError, match="is of mla: leave it out"):
        gla.Config(from_heads=2)


def qwen3():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    return transformers.Qwen3ForCausalLM, transformers.Qwen3Config(
        vocab_size=29, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=32,
    )  # fmt: skip


def test_transformers_is_the_witness(tmp_path):
    cls, config = qwen3()
    torch.manual_seed(0)
    theirs = cls(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = pretrained.load(tmp_path / "theirs")
    new, found = convert(loaded.model, "mla", **TEXT)
    tokens = TEXT["held_out"][0]
    with torch.no_grad():
        torch.testing.assert_close(new(tokens)[0], theirs(tokens).logits, rtol=1e-4, atol=1e-4)
    assert found.exact
    half, found = convert(loaded.model, "mla", rank=0.6, **TEXT)
    assert found.cache_share <= 0.6
    pretrained.save(replace(loaded, model=half), tmp_path / "half")
    with torch.no_grad():
        assert torch.equal(pretrained.load(tmp_path / "half").model(tokens)[0], half(tokens)[0])
