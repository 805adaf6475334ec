"""What is planned, against what is counted on the meta device, measured here, and kept by real processes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from attnlab import Decoder, UserError, attention, presets
from attnlab.cli import main as cli
from attnlab.config import ModelConfig, RunConfig, TrainConfig
from attnlab.costs.memory import META
from attnlab.costs.plan import Machine, Plan, Sizes, plan
from attnlab.costs.sharding import STAGES, find_sharding
from attnlab.measure.gpus import GPUS, find_gpu
from attnlab.model import attention_configs, flops_per_token
from attnlab.presets import variant
from attnlab.pretrained.families import deepseek_v3
from attnlab.spec import CacheSpec

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from plan import EVEN, LONG, counting, few_layers, measured, measuring, rounding

CPU = torch.device("cpu")
H100 = GPUS["h100"]
SMALL = RunConfig(
    model=ModelConfig(vocab_size=97, context=44, n_layers=3, d_model=40, n_heads=4, norm="rms", ff_dim=88),
    train=TrainConfig(batch_size=3, precision="bf16", device="cpu"),
)
EXPERTS = replace(SMALL, model=replace(SMALL.model, ff="moe", n_experts=5, tied=False, bias=True))
FP32 = replace(SMALL.train, precision="fp32")


@pytest.mark.parametrize("name", attention.names())
@pytest.mark.parametrize("base", [SMALL, EXPERTS], ids=["dense", "experts"])
def test_sizes_and_flops_are_those_of_the_whole_model(name: str, base: RunConfig) -> None:
    config = variant(base, name)
    sizes, model = Sizes(config), Decoder(config.model)
    memory = sizes.memory(Machine(H100))
    assert sizes.parameters == sum(p.numel() for p in model.parameters())
    assert memory.weights == memory.gradients == 4 * sizes.parameters
    assert memory.optimizer == 8 * sizes.parameters + 4 * len(list(model.parameters()))
    assert max(map(abs, counting(config, 3, recompute=base is EXPERTS))) < 0.05


@pytest.mark.parametrize("name", attention.names())
def test_large_shapes_too(name: str) -> None:
    for shape in ("gpt2-124m", "llama-8b"):
        base = presets.get(shape)
        config = variant(replace(base, model=replace(base.model, n_layers=2)), name)
        assert max(map(abs, counting(config, 1))) < 0.05
        whole = variant(base, name)  # of all layers, by the mechanism's own formula
        planned = plan(whole, Machine(H100, batch=1), advise=False).flops_per_token
        least = 0.999 if name in ("gated_delta", "kda") else 1  # their backward pass uses an inverse again
        assert least <= planned / (3 * flops_per_token(whole.model)) < 1.08  # fused kernels compute scores again


@pytest.mark.parametrize("name", attention.names())
@pytest.mark.parametrize("base", [SMALL, EXPERTS], ids=["dense", "experts"])
def test_memory_is_that_of_a_real_step(name: str, base: RunConfig) -> None:
    """On the path that a CPU takes, dropout included."""
    config = replace(variant(base, name), train=FP32)
    config = replace(config, model=replace(config.model, vocab_size=65, dropout=0.1 * (base is SMALL)))
    assert abs(measuring(config, CPU)) < 0.15


UNFUSED = ("alibi", "fox", "sinks", "differential")  # a CPU has another kernel for these than a GPU


@pytest.mark.parametrize("name", attention.names())
def test_memory_is_that_of_a_real_step_through_a_fused_kernel(name: str) -> None:
    """On the path that a GPU takes, where a CPU takes it as well; and in bfloat16, with real autocast."""
    impl = "reference" if name in UNFUSED else "sdpa"
    config = variant(replace(LONG, model=replace(LONG.model, impl=impl)), name, EVEN)
    rows = attention_configs(config.model)[0].cache_spec.rows
    config = replace(config, train=replace(config.train, batch_size=1 if rows else 2))  # of one, pads are looked for
    assert abs(measuring(config, META)) < 0.15
    if name != "differential":  # the reference is not in bfloat16 what it is under autocast
        assert abs(rounding(config)) < 0.15


def test_a_hybrid_accumulates_and_freezes_and_uses_muon() -> None:
    config = variant(SMALL, "sliding+mla")
    config = replace(config, model=replace(config.model, vocab_size=65), train=replace(FP32, accumulate=3))
    assert abs(measuring(config, CPU)) < 0.05
    assert max(map(abs, counting(replace(config, train=replace(config.train, precision="bf16")), 3))) < 0.05
    half = replace(config, train=replace(FP32, train="attention"))
    assert abs(measuring(half, CPU)) < 0.05
    sizes = Sizes(half).memory(Machine(H100))
    assert sizes.gradients < sizes.weights and sizes.optimizer < 2.1 * sizes.gradients
    muon = replace(config, train=replace(FP32, optimizer="muon"))
    assert abs(measuring(muon, CPU)) < 0.05
    assert Sizes(muon).memory(Machine(H100)).optimizer < Sizes(config).memory(Machine(H100)).optimizer


def test_recomputing_trades_memory_for_flops() -> None:
    base = presets.get("gpt2-124m")
    before, after = (plan(base, Machine(H100, recompute=again)) for again in (False, True))
    assert after.memory.activations < 0.15 * before.memory.activations
    assert after.memory.peak < before.memory.peak
    assert 1.1 < after.flops_per_token / before.flops_per_token < 4 / 3
    assert after.seconds is not None and before.seconds is not None and after.seconds > before.seconds


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["mha", "msla"])
def test_memory_is_that_of_a_real_step_that_recomputes(name: str, precision: str) -> None:
    """With wide layers and few tokens: no rounded weights of a layer are kept until it is computed again."""
    train = replace(SMALL.train, precision=precision, batch_size=1, accumulate=2)
    config = variant(replace(SMALL, train=train), name)
    config = replace(config, model=replace(config.model, vocab_size=65, ff_dim=4000, n_layers=6))
    assert abs(measuring(config, CPU, recompute=True)) < 0.05


SHARDED = """
import json, sys
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from attnlab import Decoder
from attnlab.config import RunConfig, from_dict
from attnlab.training.optimizers import make_optimizers

rank, world, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
config = from_dict(RunConfig, json.loads(sys.argv[4]))
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
torch.manual_seed(0)
model = Decoder(config.model)
for layer in model.layers:
    fully_shard(layer)
fully_shard(model)
optimizer = make_optimizers(config.train, model)["adamw"]
tokens = torch.randint(config.model.vocab_size, (2, config.model.context))
logits, _ = model(tokens)
logits.float().logsumexp(-1).mean().backward()
optimizer.step()

def local(tensors):
    return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors)

parameters = list(model.parameters())
states = [s for state in optimizer.state.values() for s in state.values()]
print(json.dumps([local(parameters), local(p.grad for p in parameters), local(states)]))
dist.destroy_process_group()
"""


def test_what_processes_keep_of_a_sharded_model(tmp_path: Path) -> None:
    """Two real ones; 97 rows of vocabulary do not divide by two."""
    from attnlab.config import to_dict

    words = ["2", str(tmp_path / "store"), json.dumps(to_dict(SMALL))]
    started = [
        subprocess.Popen([sys.executable, "-c", SHARDED, str(rank), *words], stdout=-1, stderr=-1, text=True)
        for rank in range(2)
    ]
    said = [process.communicate(timeout=120) for process in started]
    assert all(process.returncode == 0 for process in started), said
    kept = [json.loads(out) for out, _ in said]
    memory = Sizes(SMALL).memory(Machine(H100, 2, "fsdp"))
    assert [max(each) for each in zip(*kept, strict=True)] == [memory.weights, memory.gradients, memory.optimizer]
    whole = Sizes(SMALL).memory(Machine(H100, 2, "ddp"))
    assert sum(each[0] for each in kept) == whole.weights


def test_strategies_shard_what_they_say(tmp_path: Path) -> None:
    sizes = Sizes(SMALL)
    whole = sizes.memory(Machine(H100))

    def parts(machine: Machine) -> set[str]:
        found = sizes.memory(machine)
        kept = {name: getattr(found, name) for name in ("weights", "gradients", "optimizer")}
        assert all(size == getattr(whole, name) or size < 0.2 * getattr(whole, name) for name, size in kept.items())
        return {name for name, size in kept.items() if size < getattr(whole, name)}

    assert parts(Machine(H100, 8, "ddp")) == set()
    assert parts(Machine(H100, 8, "fsdp")) == {"weights", "gradients", "optimizer"}
    assert parts(Machine(H100, 8, "deepspeed")) == {"optimizer"}
    assert sizes.memory(Machine(H100, 1, "fsdp")) == whole
    file = tmp_path / "zero.json"
    for stage, sharded in [*STAGES.items()][1:]:
        file.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        assert parts(Machine(H100, 8, f"deepspeed:{file}")) == sharded
    peaks = [sizes.memory(Machine(H100, 8, name)).peak for name in ("ddp", "deepspeed", "fsdp")]
    assert peaks == sorted(peaks, reverse=True)
    file.write_text('{"zero_optimization": {"stage": 7}}')
    for text, words in ((f"deepspeed:{file}", "1, 2 or 3"), ("ddp:x", "deepspeed alone"), ("fsdpp", "'fsdp'")):
        with pytest.raises(UserError, match=words):
            find_sharding(text)


def test_the_largest_batch_fits_and_no_larger_one() -> None:
    config = presets.get("llama-8b")
    found = plan(config, Machine(GPUS["a100"], 2), context=5001, advise=False).decode
    room = 2 * round(0.9 * 80e9) - found.weights
    assert found.weights == 2 * 8_030_261_248
    assert found.cache == 2 * 32 * 2 * 8 * 128 * 5001
    assert found.batch is not None and found.batch * found.cache <= room < (found.batch + 1) * found.cache
    read = found.weights - 2 * 128_256 * 4096 + found.cache  # one row of the embedding is looked up
    assert found.seconds == pytest.approx(read / 2.039e12 / 2)
    assert found.seconds_batch == pytest.approx((read + (found.batch - 1) * found.cache) / 2.039e12 / 2)
    short = plan(config, Machine(GPUS["a100"]), context=1, advise=False).decode  # so short that it only computes
    flops = flops_per_token(config.model, 1, 1)
    assert short.batch is not None and short.seconds_batch == pytest.approx(short.batch * flops / 312e12)
    assert plan(config, Machine(find_gpu({"memory": 1e9, "flops": 1e12, "bandwidth": 1e12}))).decode.batch == 0
    assert plan(variant(config, "latent_lookup"), Machine(H100), advise=False).decode.batch is None


def test_only_experts_that_are_met_are_read() -> None:
    config = presets.get("deepseek-v3-671b")
    sizes = Sizes(config)
    one = sizes.decoding(Machine(GPUS["h200"], 16))
    read = one.seconds * 16 * 4.8e12 - one.cache
    assert read == pytest.approx(2 * 36.7e9, rel=0.02)  # README_WEIGHTS of DeepSeek-V3, without the embedding
    many = sizes.decoding(Machine(GPUS["h200"], 16), 1)
    assert many.batch is not None and many.batch > 10_000
    assert many.seconds_batch is not None and many.seconds_batch > many.seconds


def test_a_step_reads_what_it_selects() -> None:
    spec = CacheSpec(
        {"a": (3,), "b": (2,)}, reads={"a": 4}, beside={"c": CacheSpec({"a": (5,)}, every=2, reads={"a": 1})}
    )
    assert [spec.read(tokens) for tokens in (0, 1, 4, 9)] == [0, 5, 20 + 5, 4 * 3 + 9 * 2 + 5]
    assert spec.floats(9) == 9 * 5 + 4 * 5
    sparse, dense = (
        attention_configs(variant(presets.get("llama-8b"), name).model)[0].cache_spec for name in ("msla", "mla")
    )
    assert sparse.read(8192) < dense.read(8192) == dense.floats(8192) < sparse.floats(8192)


PUBLISHED = {  # config.json beside DeepSeek-V3's weights
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "qk_nope_head_dim": 128,
    "n_group": 8,
    "topk_group": 4,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "hidden_act": "silu",
    "max_position_embeddings": 4096,  # of pretraining; stretched later
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "tie_word_embeddings": False,
}


def test_the_largest_preset_is_the_published_shape() -> None:
    ours, theirs = presets.get("deepseek-v3-671b").model, deepseek_v3.to_model_config(PUBLISHED)
    assert attention_configs(ours) == attention_configs(theirs)
    plain = {"options": {}, "norm_eps": 1e-6, "balance": "bias"}
    assert replace(ours, **plain) == replace(theirs, **plain)
    train = presets.get("deepseek-v3-671b").train
    assert train.steps * train.accumulate * ours.context == pytest.approx(14.8e12, rel=1e-5)


@pytest.mark.parametrize("name", attention.names())
def test_every_mechanism_in_the_largest_shape(name: str) -> None:
    """Its first four layers: three plain ones, and one with 256 experts."""
    config = few_layers(variant(presets.get("deepseek-v3-671b"), name))
    found = plan(config, Machine(GPUS["mi300"], 128, "fsdp"), advise=False)
    assert found.memory.weights == pytest.approx(4 * found.parameters / 128, rel=0.002)  # padded
    assert found.memory.peak > found.memory.gathered > 2 * 11.5e9
    assert found.seconds is not None and found.decode.seconds > 0


def test_parts_add_up_where_nothing_else_is_needed() -> None:
    """GPT-2 on many tokens: what is held, and the logits."""
    found = plan(presets.get("gpt2-124m"), Machine(H100)).memory
    known = found.weights + found.gradients + found.optimizer + found.copies + found.activations
    logits = 12 * 1024 * 50257
    assert known + 8 * logits < found.peak < known + 16 * logits


Said = Callable[..., tuple[int, str, str]]


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Said:
    monkeypatch.setenv("COLUMNS", "80")

    def said(*words: str) -> tuple[int, str, str]:
        code = cli.main(["plan", *words])
        return code, *capsys.readouterr()

    return said


def test_the_command_says_what_it_found(said: Said) -> None:
    words = ["gpt2-124m", "--gpus", "8", "--gpu", "a100", "--tokens", "10e9", "--mfu", "0.5", "--context", "512"]
    code, out, _ = said(*words)
    assert code == 0
    rows = {line.split()[0]: line for line in out.splitlines() if line}
    assert set(attention.names()) <= set(rows)
    assert max(map(len, out.splitlines())) <= 80 and "…" not in out
    for fact in ("8 x a100, ddp", "124,439,808", "fits", "at an MFU of 50%", "sequences of 512 tokens", "90%"):
        assert fact in out
    code, text, _ = said(*words, "--mechanisms", "mqa,sliding+mla", "--json")
    found = json.loads(text)
    assert code == 0 and found["memory"]["weights"] == 4 * found["parameters"] == 4 * 124_439_808
    assert found["seconds"] == pytest.approx(found["flops_per_token"] * 10e9 / (8 * 312e12 * 0.5))
    assert [each["mechanism"] for each in found["mechanisms"]] == ["mqa", "sliding+mla"]
    assert set(Plan.__dataclass_fields__) < set(found)


def test_wide_tables_fit(said: Said) -> None:
    _, out, _ = said("llama-70b", "--gpus", "512", "--strategy", "fsdp", "--mechanisms", "latent_lookup,sliding")
    assert max(map(len, out.splitlines())) <= 80 and "…" not in out


def test_what_does_not_fit_says_what_would(said: Said) -> None:
    code, out, _ = said("llama-8b", "--gpus", "8", "--mechanisms", "")
    assert code == 1 and "does not fit" in out
    remedy = out.partition("It would fit with ")[2].partition("\n\n")[0].split()
    assert remedy == ["--strategy", "fsdp", "--recompute"]
    code, out, _ = said("llama-8b", "--gpus", "8", *remedy, "--mechanisms", "")
    assert code == 0 and "does not fit" not in out
    code, out, _ = said("llama-8b", "--mechanisms", "", "--gpu", "a100", "--batch", "3")
    again = out.partition("It would fit with ")[2].partition("\n\n")[0].split()
    assert code == 1 and "--gpus" in again
    assert said("llama-8b", "--mechanisms", "", "--gpu", "a100", *again)[0] == 0
    code, out, _ = said("deepseek-v3-671b", "--mechanisms", "", "--gpu", "a100")
    assert code == 1 and "a whole layer" in out and "the weights do not fit" in out


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["quik"], ["'quick'"]),
        (["quick", "--gpu", "h1000"], ["'h1000'", "mi300", "did you mean 'h100'"]),
        (["quick", "--gpu", '{"memory": 1e9}'], ["flops", "bandwidth"]),
        (["quick", "--gpu", '{"memory": 1e9, "flops": -1, "bandwidth": 1}'], ["above 0"]),
        (["quick", "--gpu", "{"], ["--gpu", "JSON"]),
        (["quick", "--gpus", "0"], ["--gpus is 0", "at least 1"]),
        (["quick", "--batch", "0"], ["batch is 0"]),
        (["quick", "--strategy", "zero"], ["'zero'", "ddp, fsdp, deepspeed"]),
        (["quick", "--strategy", "deepspeed:nowhere.json"], ["nowhere.json"]),
        (["quick", "--mfu", "40"], ["--mfu is 40", "at most 1"]),
        (["quick", "--tokens", "0"], ["--tokens is 0", "above 0"]),
        (["gpt2-124m", "--context", "2000"], ["2000", "1024", "learned"]),
        (["quick", "--context", "0"], ["--context is 0", "at least 1"]),
        (["quick", "--mechanisms", "mha,mal"], ["'mal'"]),
        (["quick", "--options", '{"mla": {"kv_rnk": 3}}'], ["did you mean 'kv_rank'"]),
        (["quick", "--mechanism", "msla", "--model.context", "8"], ["top_k", "32"]),
    ],
    ids=" ".join,
)
def test_bad_input_is_one_sentence(words: list[str], wanted: list[str], said: Said) -> None:
    code, out, error = said(*words)
    assert (code, out) == (2, "") and error.count("\n") == 1, error
    assert all(word in error for word in wanted), error


def test_float32_has_no_time(said: Said) -> None:
    code, out, _ = said("quick", "--train.precision", "fp32", "--mechanisms", "mha")
    assert code == 0 and "unknown" in out and "fp32" in out


def test_the_step_measured_is_a_real_one() -> None:
    """The measure itself: at least weights, both states and the gradients."""
    config = replace(SMALL, train=FP32, model=replace(SMALL.model, vocab_size=65))
    assert measured(config) > 16 * Decoder(config.model).parameter_count()
