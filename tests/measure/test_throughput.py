"""What training achieves: declared FLOPs against counted ones, and sums over ranks."""

from __future__ import annotations

import math
import random
import statistics
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from attnlab import attention
from attnlab.config import ExpertsConfig, ModelConfig, RunConfig, TrainConfig
from attnlab.errors import UserError
from attnlab.measure.counters import counted_flops, peak_bytes, reset_peak
from attnlab.measure.gpus import Peak, datasheet, find_peak, measured_peak
from attnlab.model import Decoder, attention_configs
from attnlab.scan import chunk_size
from attnlab.training.throughput import (
    Account,
    Interval,
    Laggards,
    combine,
    document_lengths,
    recomputed_flops,
    training_flops,
)

CPU = torch.device("cpu")
MODEL = ModelConfig(vocab_size=61, context=39, n_layers=2, d_model=32, n_heads=4)
OPTIONS = {"msla": {"top_k": 5, "local": 2}}  # sparse at this length


def counted(config, batch=3):
    model = Decoder(config).train()
    tokens = torch.randint(config.vocab_size, (batch, config.context))
    return counted_flops(lambda: model.loss(tokens, tokens).backward()) / batch


def chosen_without_gradient(c, n):
    """mka: which token is of which chunk has no gradient, and neither has the score by which chunks are recalled."""
    sums, scores = 2 * (n // c.chunk + 2) * n * c.d_model, 2 * n * (n // c.chunk) * c.n_kv_heads * c.head_dim
    return -sums - 2 * scores


def an_indexer_taught_by_few(c, n):
    """msla: the indexer chooses without gradient; some queries then compute their weights again and teach it, not x."""
    J, E, D, taught = c.index_heads, c.index_dim, c.d_model, len(range((n - 1) % c.learn_every, n, c.learn_every))
    ask = D * J * E + D * J  # of one query
    indexer = n * (ask + D * E) + n * n * J * E
    weights = taught * c.n_heads * (c.head_dim * c.kv_rank + n * (c.kv_rank + c.rope_dim))
    lesson = 2 * taught * ask + 3 * taught * n * J * E + n * D * E  # scores, and back to the indexer's weights
    return 2 * (weights + lesson - 2 * indexer)


def blocks_without_gradient(c, n):
    """moba: the mean keys are there to choose blocks alone, and a choice has no gradient."""
    sums = 2 * (n // c.block + 2) * n * c.n_kv_heads * c.head_dim
    scores = 2 * n * (n // c.block) * c.n_heads * c.head_dim
    return -2 * (sums + scores)


def a_choice_without_gradient(c, n):
    """nsa: which token is of which block has no gradient, and neither has the second scoring, which chooses blocks."""
    sums = 2 * (n // c.block + 2) * n * c.kv_size
    scores = 2 * n * (n // c.block) * c.n_heads * c.head_dim
    return -sums - 2 * scores


def an_inverse_used_again(c, n):
    """The delta rule: the backward pass uses the inverse of the forward pass, and differentiates what it was for."""
    C = chunk_size(c.chunk, n)
    return -2 * -(-n // C) * C * c.n_heads * (2 * (C * C - 4) // 3)


BEYOND = {  # of three forward passes, by layer
    "mka": chosen_without_gradient,
    "moba": blocks_without_gradient,
    "nsa": a_choice_without_gradient,
    "msla": an_indexer_taught_by_few,
    "gated_delta": an_inverse_used_again,
    "kda": an_inverse_used_again,
}


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
@pytest.mark.parametrize("name", attention.names())
def test_training_is_three_forward_passes(name, impl):
    config = replace(MODEL, mechanisms=(name,), impl=impl, options={k: v for k, v in OPTIONS.items() if k == name})
    beyond = sum(BEYOND[name](c, 39) for c in attention_configs(config)) if name in BEYOND else 0
    assert counted(config) == pytest.approx(39 * training_flops(config) + beyond, rel=1e-12)
    assert abs(beyond) < 0.06 * 39 * training_flops(config)


@pytest.mark.parametrize(
    "fields",
    [
        {"ff": "swiglu", "tied": False, "positions": "learned"},
        {"ff": "moe", "n_experts": 5, "experts_per_token": 2},
        {"ff": "moe", "experts": ExpertsConfig(kind="swiglu", width=24, shared=1, dense_layers=1), "balance": "bias"},
        {"mechanisms": ("sliding", "mla"), "n_layers": 3},
    ],
    ids=["swiglu", "experts", "shared experts", "hybrid"],
)
def test_so_is_that_of_other_models(fields):
    config = replace(MODEL, impl="reference", **fields)
    assert counted(config) == pytest.approx(39 * training_flops(config), rel=1e-12)


@pytest.mark.parametrize(
    "fields", [{"bias": True}, {"ff": "swiglu"}, {"dropout": 0.2}, {"ff": "moe", "experts": ExpertsConfig(shared=1)}]
)
def test_layers_computed_again_cost_what_is_said(fields):
    config = replace(MODEL, impl="reference", mechanisms=("gqa",), **fields)
    model = Decoder(config).train()
    for layer in model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    tokens = torch.randint(61, (3, 39))
    found = counted_flops(lambda: model.loss(tokens, tokens).backward()) / 3 / 39
    assert found == pytest.approx(training_flops(config) + recomputed_flops(config), rel=1e-12)


def test_documents_have_the_lengths_they_have():
    documents = torch.tensor([[0, 0, 0, 1, 1, -1], [1, 1, 2, 2, 2, 2], [0, -1, -1, -1, -1, -1], [0, 0, 0, 0, 0, 0]])
    assert document_lengths(documents) == [3, 2, 2, 4, 1, 6]
    lengths = [[random.Random(seed).randint(1, 9) for _ in range(4)] for seed in range(20)]
    rows = [[n for n, size in enumerate(row) for _ in range(size)] for row in lengths]
    padded = torch.tensor([row + [-1] * (40 - len(row)) for row in rows])
    assert document_lengths(padded) == [size for row in lengths for size in row]


def test_packed_documents_cost_what_each_costs_alone():
    config = RunConfig(model=MODEL)
    account = Account(config, None, CPU)
    account.step(tokens=10, seconds=1.0, lengths=[8, 4])
    alone = 8 * training_flops(MODEL, 8) + 4 * training_flops(MODEL, 4)
    assert account.take().flops == alone < 12 * training_flops(MODEL)


def test_an_account_holds_what_came_since_it_was_asked():
    account = Account(RunConfig(model=MODEL), Peak(1e9, "given"), CPU)
    for _ in range(2):
        for seconds, waited in [(0.5, 0.1), (1.5, 0.2)]:
            account.step(tokens=39, seconds=seconds, waited=waited)
        found = account.take()
        assert found[:5] == (78, 2.0, pytest.approx(0.3), 78 * training_flops(MODEL), 78 * training_flops(MODEL))
        record = combine([found])
        assert record["mfu"] == pytest.approx(39 * training_flops(MODEL) / 1e9)
        assert record["data_wait"] == pytest.approx(0.15) and record["memory"] > 2**20
        assert set(record) == {"tokens_per_s", "flops_per_s", "mfu", "data_wait", "memory"}
    assert combine([account.take()]) == {}


def test_computing_again_is_no_model_work():
    account = Account(RunConfig(model=MODEL), Peak(1e9, "given"), CPU, recompute=True)
    account.step(tokens=100, seconds=2.0)
    record = combine([account.take()])
    assert record["mfu"] == pytest.approx(50 * training_flops(MODEL) / 1e9)
    assert record["hfu"] - record["mfu"] == pytest.approx(50 * recomputed_flops(MODEL) / 1e9)


@pytest.mark.parametrize(
    "config",
    [
        RunConfig(model=MODEL, train=TrainConfig(train="attention")),
        RunConfig(model=MODEL, train=TrainConfig(distill=0.5), teacher="gpt2"),
    ],
    ids=["frozen parts", "a teacher"],
)
def test_what_the_formula_does_not_describe_has_no_mfu(config):
    account = Account(config, Peak(1e9, "given"), CPU)
    account.step(tokens=100, seconds=2.0)
    assert set(combine([account.take()])) == {"tokens_per_s", "data_wait", "memory"}


def test_no_peak_no_mfu():
    account = Account(RunConfig(model=MODEL), None, CPU)
    account.step(tokens=100, seconds=2.0)
    assert set(combine([account.take()])) == {"tokens_per_s", "flops_per_s", "data_wait", "memory"}


@pytest.mark.parametrize("seed", range(5))
def test_ranks_add_up(seed):
    draw = random.Random(seed)
    ranks = [Interval(*(draw.uniform(1, 9) for _ in range(7))) for _ in range(draw.randint(2, 9))]
    record = combine(ranks)
    longest = max(r.seconds for r in ranks)
    assert record["tokens_per_s"] == pytest.approx(sum(r.tokens for r in ranks) / longest)
    assert record["mfu"] == pytest.approx(sum(r.flops for r in ranks) / longest / sum(r.peak for r in ranks))
    assert 0 < record["data_wait"] == pytest.approx(sum(r.waited for r in ranks) / sum(r.seconds for r in ranks))
    assert record["tokens_per_s_min"] <= record["tokens_per_s"] / len(ranks) <= record["tokens_per_s_max"]
    assert ranks[record["slowest_rank"]].seconds == longest
    assert (record["memory"], record["memory_total"]) == (
        max(r.memory for r in ranks),
        pytest.approx(sum(r.memory for r in ranks)),
    )
    alike = combine([ranks[0]] * 3)
    one = combine(ranks[:1])
    assert all(alike[name] == pytest.approx(one[name]) for name in ("mfu", "data_wait", "memory"))
    assert alike["tokens_per_s"] == pytest.approx(3 * one["tokens_per_s"])
    torch.testing.assert_close(torch.tensor(ranks, dtype=torch.float64).tolist(), [list(r) for r in ranks])


@pytest.mark.parametrize("seed", range(5))
def test_who_falls_behind_is_named_once(seed):
    draw = random.Random(seed)
    ranks = draw.randint(2, 9)
    slow = draw.randrange(ranks)
    laggards = Laggards(factor=1.5, patience=3)

    def look(factor):
        pace = draw.uniform(0.1, 10)
        return laggards.look([pace * draw.uniform(0.9, 1.1) * (factor if r == slow else 1) for r in range(ranks)])

    assert [look(1) for _ in range(5)] == [[]] * 5
    told = [look(2) for _ in range(6)]
    assert [[each.rank for each in found] for found in told] == [[], [], [slow], [], [], []]
    assert f"rank {slow} falls behind: " in str(told[2][0])
    assert look(1) == [] and [len(look(3)) for _ in range(3)] == [0, 0, 1]  # anew
    assert look(1) == look(2) == look(2) == look(1) == look(2) == []  # not in a row


def test_of_one_nobody_falls_behind_and_of_two_one_can():
    assert [Laggards(patience=1).look([n]) for n in (0.0, 1.0, 9.0)] == [[], [], []]
    (found,) = Laggards(patience=1).look([4.0, 2.0])
    assert str(found) == "rank 0 falls behind: 4 s of work, 2.0 times the median of all ranks"
    assert statistics.median([4.0, 2.0]) * 1.5 > 4  # so the plain median would never name one of two


@pytest.mark.parametrize(
    ("gpu", "bf16", "fp32"),
    [
        ("NVIDIA A100-SXM4-40GB", 312e12, 19.5e12),
        ("NVIDIA A100 80GB PCIe", 312e12, 19.5e12),
        ("NVIDIA H100 80GB HBM3", 989.5e12, 67e12),
        ("NVIDIA H100 PCIe", 756.5e12, 51e12),
        ("NVIDIA H200", 989.5e12, 67e12),
    ],
)
def test_datasheets_are_found_by_the_name_of_the_gpu(gpu, bf16, fp32):
    for precision, rate in (("bf16", bf16), ("fp16", bf16), ("fp32", fp32)):
        found = datasheet(gpu, precision)
        assert found is not None and found.rate == rate and f"datasheet of the {gpu}, dense" in found.source


def test_a_gpu_not_listed_and_a_slice_of_one_have_no_datasheet():
    others = "NVIDIA L40", "NVIDIA GH200 480GB", "NVIDIA H100 NVL", "NVIDIA H200 NVL", "NVIDIA A100X", ""
    for gpu in (*others, "NVIDIA H100 80GB HBM3 MIG 1g.10gb"):
        assert datasheet(gpu, "bf16") is None


def test_a_peak_says_where_it_is_from():
    assert find_peak(CPU, "bf16", 2e12) == (2e12, "given by --peak")
    for wrong in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(UserError, match=r"--peak is .*: give the FLOPs per second"):
            find_peak(CPU, "fp32", wrong)
    found = find_peak(CPU, "fp32")
    assert 1e8 < found.rate < 1e15
    threads = torch.get_num_threads()
    words = f"measured: product of two 1024x1024 float32 matrices on cpu, {threads} thread{'s' if threads > 1 else ''}"
    assert found.source == words and str(found) == f"{found.rate / 1e12:.3g} TFLOP/s ({words})"
    assert "bfloat16" in measured_peak(CPU, "bf16", torch.get_num_threads()).source


def test_peak_memory_is_of_this_process_and_begins_anew():
    reset_peak()
    before = peak_bytes(CPU)
    held = torch.ones(2**25)
    assert peak_bytes(CPU) >= before + 0.9 * held.nbytes
