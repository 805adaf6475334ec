from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from attnlab import attention
from attnlab.config import ModelConfig, RunConfig, TrainConfig
from attnlab.costs import bench
from attnlab.costs.bench import Timing
from attnlab.costs.crossover import context_crossovers, query_crossover
from attnlab.errors import UserError
from attnlab.measure.counters import counted_flops, interleaved, peak_growth, tensor_bytes
from attnlab.model import attention_configs, parameters
from attnlab.presets import variant
from attnlab.results import BenchRecord

PRESET = RunConfig(
    model=ModelConfig(context=24, n_layers=2, d_model=32, n_heads=4, options={}),
    train=TrainConfig(batch_size=3, precision="fp32", device="cpu"),
)
OPTIONS = {"msla": {"top_k": 5, "local": 1, "index_dim": 6}}  # sparse already at these lengths
CPU = torch.device("cpu")


def test_turns_are_taken():
    calls = []

    def call(name):
        return lambda: calls.append(name) or float(len(calls))

    seconds = interleaved({"a": call("a"), "b": call("b")}, repeats=2)
    assert "".join(calls) == "ab" + "abab"
    assert seconds == {"a": [3.0, 5.0], "b": [4.0, 6.0]}


def test_peak_growth_counts_what_lives_at_the_worst_moment():
    kept = torch.zeros(1000)

    def call():
        a, b = torch.zeros(1000), torch.zeros(500)  # 6,000 bytes
        del a
        kept.add_(1)  # nothing new
        return b.view(5, 100), torch.zeros(100)  # 2,400 bytes

    assert peak_growth(call, CPU) == 6000
    assert tensor_bytes([kept, kept[3:], kept.view(10, 100)]) == 4000


def test_a_backward_pass_needs_its_saved_tensors():
    net = nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(4)])
    x = torch.randn(128, 64)

    def forward():
        with torch.no_grad():
            net(x)

    sheet = 128 * 64 * 4
    assert peak_growth(forward, CPU) == 3 * sheet  # what a block reads, its product, its output
    assert peak_growth(lambda: net(x).sum().backward(), CPU) >= 8 * sheet


@pytest.mark.parametrize("causal", [True, False])
def test_flops_of_attention_on_the_cpu_are_counted(causal):
    q = torch.randn(2, 3, 16, 8, requires_grad=True)

    def forward():
        return nn.functional.scaled_dot_product_attention(q, q, q, is_causal=causal)

    forward_flops = 2 * 3 * 4 * 16 * 16 * 8
    assert counted_flops(forward) == forward_flops
    assert counted_flops(lambda: forward().sum().backward()) == forward_flops * 7 // 2


def test_a_module_called_without_gradients_is_counted_too():
    net = nn.Sequential(nn.Linear(8, 8, bias=False))
    x = torch.randn(4, 8, requires_grad=True)

    def forward():
        y = net(x * 2)
        with torch.no_grad():
            net(y[:])
        y.sum().backward()

    assert counted_flops(forward) == 4 * 2 * 4 * 8 * 8


@pytest.mark.parametrize("name", attention.names())
def test_decoding_is_measured_at_the_context_asked_for(name):
    records = bench.bench("decode", PRESET, [name], [9, 24], options=OPTIONS, timing=Timing(2, steps=3))
    assert [r.mode for r in records[: len(records) // 2]] == list(attention.module(name).Config.modes or [""])
    for r in records:
        assert r.error == "" and r.ms is not None and r.tokens_per_s is not None
        specs = [c.cache_spec for c in attention_configs(variant(PRESET, name, OPTIONS).model)]
        assert r.cache_bytes == 4 * sum(spec.floats(r.context) for spec in specs)
        assert r.ms_spread[0] <= r.ms <= r.ms_spread[1]
        assert r.tokens_per_s == pytest.approx(1e3 / r.ms)
        assert r.relative is None or name == "mha"
        assert r.flops and r.peak_bytes and r.peak_bytes > 4 * r.parameters
        assert (r.dtype, r.device, r.impl, r.repeats, r.batch) == ("float32", "cpu", "sdpa", 2, 1)
    assert records[0].parameters == parameters(variant(PRESET, name, OPTIONS).model)


def test_prefill_counts_the_flops_that_the_mechanism_declares():
    (record,) = bench.bench("prefill", PRESET, ["gqa"], timing=Timing(1), batch=2)
    config = variant(PRESET, "gqa").model
    layers = sum(c.flops(24, 24) for c in attention_configs(config)) + 2 * 24 * 2 * (2 * 32 * 128)
    each = layers + 2 * 32 * 65  # the head reads the last token only
    assert record.flops == 2 * each
    assert record.tokens_per_s == pytest.approx(1e3 * 2 * 24 / record.ms)
    assert record.cache_bytes == 2 * 24 * 2 * 2 * 8 * 4


def test_training_is_relative_to_mha_and_its_memory_holds_the_optimizer():
    records = bench.bench("train", PRESET, ["gqa", "mha"], timing=Timing(2), options=OPTIONS)
    gqa, mha = records
    assert mha.relative == 1 and gqa.relative == pytest.approx(gqa.ms / mha.ms)
    for r in records:
        assert r.cache_bytes is None and r.batch == 3 and r.error == ""
        assert r.peak_bytes > 16 * r.parameters  # weights, gradients, two moments
        assert r.tokens_per_s == pytest.approx(1e3 * 3 * 24 / r.ms)
    config = variant(PRESET, "mha").model
    forward = sum(c.flops(24, 24) for c in attention_configs(config)) + 2 * 24 * 2 * (2 * 32 * 128) + 2 * 24 * 32 * 65
    assert 2.5 * 3 * forward < mha.flops < 3.5 * 3 * forward


def test_bfloat16_is_measured_in_bfloat16():
    preset = replace(PRESET, train=replace(PRESET.train, precision="bf16"))
    (record,) = bench.bench("decode", preset, ["mha"], timing=Timing(1, steps=2))
    assert record.dtype == "bfloat16" and record.error == "" and record.cache_bytes == 2 * 2 * 24 * 2 * 32


def wrong_in_the_cache(self, x, positions, cache=None, mask=None):
    y, cache = self.honest(x, positions, cache, mask)
    return (y if positions.shape[1] > 1 else 0.5 * y), cache


def test_no_time_is_given_for_wrong_outputs(monkeypatch):
    cls = attention.module("mlp_latent").Attention
    monkeypatch.setattr(cls, "honest", cls.forward, raising=False)
    monkeypatch.setattr(cls, "forward", wrong_in_the_cache)
    bad, gqa = bench.bench("decode", PRESET, ["mlp_latent", "gqa"], timing=Timing(1, steps=2))
    assert bad.ms is None and bad.tokens_per_s is None
    assert bad.error.startswith("the logits of 24 tokens in chunks and steps through the cache are off by")
    assert gqa.ms is not None and gqa.error == ""


def test_a_case_that_cannot_run_spoils_no_other():
    preset = replace(PRESET, model=replace(PRESET.model, impl="flex"))
    (record,) = bench.bench("train", preset, ["mha"], timing=Timing(1))
    assert "no gradients on a CPU" in record.error and record.ms is None
    few, enough = bench.bench("decode", PRESET, ["msla"], [3], options=OPTIONS, timing=Timing(1))
    assert "top_k is 5 and the context 3" in few.error == enough.error


def test_bad_input_is_refused():
    for arguments, what in [
        (("prefil", PRESET, ["mha"]), "did you mean 'prefill'"),
        (("decode", PRESET, ["mhq"]), "unknown mechanism 'mhq'"),
        (("decode", PRESET, ["mha"], [1]), "at least 2 tokens"),
        (("train", PRESET, ["mha"], [0]), "contexts is 0: it must be at least 1"),
        (("train", PRESET, []), "no mechanism"),
        (("train", PRESET, ["mha"], [2_000_000]), "corpus|text|characters"),
    ]:
        with pytest.raises(UserError, match=what):
            bench.bench(*arguments)
    with pytest.raises(UserError, match="repeats is 0"):
        bench.bench("train", PRESET, ["mha"], timing=Timing(0))


def decode(mode, context, ms):
    return BenchRecord(kind="decode", mechanism="mla", mode=mode, context=context, ms=ms)


def test_the_crossover_lies_where_the_lines_meet():
    records = [decode("expanded", c, c / 100) for c in (100, 400, 1600)] + [
        decode("absorbed", c, 2 * (c / 100) ** 0.5) for c in (100, 400, 1600)
    ]
    (found,) = context_crossovers(records)
    assert found.at == pytest.approx(400)
    assert str(found) == "mla: expanded is faster up to 400 tokens held, absorbed from there on"
    (never,) = context_crossovers(records[:1] + records[3:4])
    assert never.at is None and str(never) == "mla: expanded is faster at 100 and at 100 tokens held"
    noisy = [decode("expanded", c, 1.0) for c in (1, 2, 3)]
    noisy += [decode("absorbed", c, ms) for c, ms in ((1, 2.0), (2, 0.9), (3, 2.0))]
    (found,) = context_crossovers(noisy)
    assert found.at is None and str(found) == "mla: expanded is faster at 1 and at 3 tokens held"
    assert context_crossovers(records[:3]) == []


def test_the_crossover_over_queries_is_measured():
    found = query_crossover(PRESET, "mla", queries=(1, 4, 8), repeats=1)
    assert [point[0] for point in found.points] == [1, 4, 8] and found.modes == ("expanded", "absorbed")
    with pytest.raises(UserError, match="mha is computed in one way only"):
        query_crossover(PRESET, "mha")
