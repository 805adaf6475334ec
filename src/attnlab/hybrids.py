"""Shapes of published hybrid models, whose layers have different mechanisms, and small ones of the same pattern.

Each keeps the published sizes of attention, feed-forward and vocabulary, and says what it leaves out. Data, batch,
steps and rates are ours. `presets` gives them names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .config import ExpertsConfig, ModelConfig, RunConfig, TrainConfig
from .spec import RopeScaling

TRAIN = TrainConfig(steps=100_000, batch_size=1, accumulate=512, lr=3e-4, min_lr=3e-5, warmup=2000, betas=(0.9, 0.95))


def gpt_oss_20b() -> RunConfig:
    """gpt-oss-20b's shape (arXiv 2508.10925): sinks in every layer, a window of 128 tokens in every other one; 32
    experts of which a token passes 4; 20,908,120,896 parameters.

    Left out: the biases of experts and router (6,636,288 parameters), and the clamp inside their SwiGLU."""
    layers = 24
    heads = {"n_kv_heads": 8, "bias": True}
    windows = {f"sinks@{i}": {"window": 128} for i in range(0, layers, 2)}
    scaling = RopeScaling(
        kind="yarn", factor=32, original=4096, fast=32, slow=1, whole=False, magnitude=0.1 * math.log(32) + 1
    )
    model = ModelConfig(
        vocab_size=201_088,
        context=131_072,
        n_layers=layers,
        d_model=2880,
        n_heads=64,
        head_dim=64,
        mechanisms=("sinks",),
        options={"sinks": heads, **windows},
        rope_theta=150_000.0,
        rope_scaling=scaling,
        norm="rms",
        norm_eps=1e-5,
        ff="moe",
        ff_dim=2880,
        n_experts=32,
        experts_per_token=4,
        experts=ExpertsConfig(kind="swiglu"),
        tied=False,
    )
    return RunConfig(name="gpt-oss-20b", model=model, train=TRAIN)


def gemma_3_1b() -> RunConfig:
    """Gemma 3 1B's shape (arXiv 2503.19786): five layers with a window of 512 tokens for one without, query and key
    heads normed, two rotary bases; 999,826,048 parameters.

    Left out: the norms after attention and feed-forward (59,904 parameters) and the factor sqrt(D) of the embedding;
    the gate of the feed-forward is silu, not gelu."""
    heads = {"n_kv_heads": 1, "qk_norm": 1e-6}
    model = ModelConfig(
        vocab_size=262_144,
        context=32_768,
        n_layers=26,
        d_model=1152,
        n_heads=4,
        head_dim=256,
        mechanisms=("sliding",) * 5 + ("gqa",),
        options={"sliding": {**heads, "window": 512}, "gqa": {**heads, "rope_theta": 1_000_000.0}},
        norm="rms",
        ff="swiglu",
        ff_dim=6912,
    )
    return RunConfig(name="gemma-3-1b", model=model, train=TRAIN)


def qwen3_next_80b() -> RunConfig:
    """Qwen3-Next 80B-A3B's shape (the config.json beside its weights): three gated delta rules for one gated attention;
    512 experts of which a token passes 10, and a shared one; 79,674,292,992
    parameters.

    Left out: the gate of the shared expert (98,304 parameters), and the module that guesses further tokens."""
    delta = {"n_heads": 32, "head_dim": 128, "key_heads": 16, "v_dim": 128}
    gated = {"n_kv_heads": 2, "qk_norm": 1e-6, "rope_dim": 64, "elementwise": True}
    model = ModelConfig(
        vocab_size=151_936,
        context=262_144,
        n_layers=48,
        d_model=2048,
        n_heads=16,
        head_dim=256,
        mechanisms=("gated_delta",) * 3 + ("gated",),
        options={"gated_delta": delta, "gated": gated},
        rope_theta=10_000_000.0,
        norm="rms",
        ff="moe",
        n_experts=512,
        experts_per_token=10,
        experts=ExpertsConfig(kind="swiglu", width=512, shared=1),
        tied=False,
    )
    return RunConfig(name="qwen3-next-80b", model=model, train=TRAIN)


def kimi_linear_48b() -> RunConfig:
    """Kimi Linear 48B-A3B's shape (arXiv 2510.26692): three kda for one mla without positions, and mla in the last
    layer; 256 experts of which a token passes 8, and a shared one; 49,122,675,072 parameters.

    Nothing is left out. The 64 dimensions of its mla that all heads share do not turn: their places are so far out that
    the angle of every token is 0."""
    latent = {"kv_rank": 512, "v_dim": 128, "rope_places": [1000.0] * 32}
    model = ModelConfig(
        vocab_size=163_840,
        context=1_048_576,
        n_layers=27,
        d_model=2304,
        n_heads=32,
        head_dim=128,
        mechanisms=("kda", "kda", "kda", "mla") * 6 + ("kda", "kda", "mla"),
        options={"mla": latent},
        norm="rms",
        norm_eps=1e-5,
        ff="moe",
        ff_dim=9216,
        n_experts=256,
        experts_per_token=8,
        experts=ExpertsConfig(kind="swiglu", width=1024, shared=1, dense_layers=1, score="sigmoid", scale=2.446),
        balance="bias",
        tied=False,
    )
    return RunConfig(name="kimi-linear-48b", model=model, train=TRAIN)


def small(whole: RunConfig, name: str, layers: int, **options: Mapping[str, Any]) -> RunConfig:
    """Return the first so many layers of a hybrid at the size of a laptop's model, with SwiGLU in place of experts."""
    model = ModelConfig(
        context=64,
        n_layers=layers,
        d_model=128,
        n_heads=8,
        mechanisms=whole.model.mechanisms[:layers],
        options=options,
        norm="rms",
        ff="swiglu",
    )
    train = TrainConfig(
        steps=400, batch_size=12, lr=4e-3, min_lr=4e-4, warmup=40, eval_every=100, eval_batches=20, save_every=200
    )
    return replace(whole, name=name, model=model, train=train)


def small_gpt_oss() -> RunConfig:
    """gpt-oss's pattern for a laptop: sinks, and a window of 16 tokens in every other layer; on Shakespeare's
    characters, with SwiGLU in place of experts."""
    windows = {f"sinks@{i}": {"window": 16} for i in (0, 2)}
    return small(gpt_oss_20b(), "gpt-oss-small", 4, sinks={"n_kv_heads": 2}, **windows)


def small_gemma_3() -> RunConfig:
    """Gemma 3's pattern for a laptop: five windows of 16 tokens for one layer without; on Shakespeare's characters."""
    heads = {"n_kv_heads": 2, "qk_norm": 1e-6}
    return small(gemma_3_1b(), "gemma-3-small", 6, sliding={**heads, "window": 16}, gqa=heads)


def small_qwen3_next() -> RunConfig:
    """Qwen3-Next's pattern for a laptop: three gated delta rules for one gated attention; on Shakespeare's characters,
    with SwiGLU in place of experts."""
    gated = {"n_kv_heads": 2, "qk_norm": 1e-6, "rope_dim": 4, "elementwise": True}
    return small(qwen3_next_80b(), "qwen3-next-small", 4, gated_delta={}, gated=gated)


def small_kimi_linear() -> RunConfig:
    """Kimi Linear's pattern for a laptop: three kda for one mla without positions; on Shakespeare's characters, with
    SwiGLU in place of experts."""
    return small(kimi_linear_48b(), "kimi-linear-small", 4, kda={}, mla={"rope_dim": 0})


WHOLE = (gpt_oss_20b, gemma_3_1b, qwen3_next_80b, kimi_linear_48b)
SMALL = (small_gpt_oss, small_gemma_3, small_qwen3_next, small_kimi_linear)
