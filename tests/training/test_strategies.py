"""The same run under every strategy: it has the same numbers, and goes on under any other strategy.

Launches are few, because a process takes seconds to start: each does a list of jobs (`process_worker.py`).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import PANGRAM, tiny_model, tiny_run, tiny_training

from attnlab import pretrained
from attnlab.cli.plan import plan as plan_help
from attnlab.cli.train import train as train_help
from attnlab.config import Execution, RunConfig, TrainConfig, to_dict
from attnlab.errors import UserError
from attnlab.evaluation.perplexity import evaluate_source
from attnlab.inference.generate import Sampling
from attnlab.inference.text import sample_run
from attnlab.results import RunResult
from attnlab.runs import folder as run_folder
from attnlab.runs.folder import RunFolder
from attnlab.training import strategies as registry
from attnlab.training.step import part_sizes
from attnlab.training.train import Trainer, resolve, train, train_step

TEXT = 40 * PANGRAM
WORKER = Path(__file__).parents[1] / "process_worker.py"
MODELS: dict[str, dict[str, Any]] = {
    "mha": {},
    "mla": {"mechanisms": ("mla",)},
    "msla": {"mechanisms": ("msla",), "options": {"msla": {"top_k": 8}}},
    "mka": {"mechanisms": ("mka",)},
    "moe": {"ff": "moe", "n_experts": 3},
    "moe-bias": {"ff": "moe", "n_experts": 3, "balance": "bias"},
}
STEPS = {"msla": 10}  # it selects discretely: what rounding tells apart may be chosen differently
Results = dict[Any, dict[str, Any]]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("strategies")
    for stage in (2, 3):
        (home / f"zero{stage}.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    return home


def config_of(home: Path, name: str, **fields: Any) -> RunConfig:
    steps = {"steps": STEPS.get(name, 20), "warmup": 5, "log_every": 1, "eval_every": 10, "save_every": 1000}
    train = tiny_training(**{**steps, "batch_size": 4, "lr": 3e-3, "eval_batches": 3, **fields})
    return tiny_run(home, name=name, text=TEXT, model=tiny_model(d_model=20, **MODELS[name]), train=train, seed=3)


def launch(home: Path, processes: int, jobs: Mapping[Any, Any], **environment: str) -> Results:
    """What each job came to. No processes: without a launcher."""
    listed = home / f"jobs-{processes}-{len(list(home.iterdir()))}.json"
    listed.write_text(json.dumps(list(jobs.values())))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes else []
    command = [sys.executable, *launcher, str(WORKER), str(listed)]
    env = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=env)
    assert done.returncode == 0, done.stderr[-5000:]
    found = [
        json.loads(line.removeprefix("RESULT ")) for line in done.stdout.splitlines() if line.startswith("RESULT ")
    ]
    return dict(zip(jobs, found, strict=True))


def strategies(home: Path) -> dict[str, str]:
    return {
        "single": "single",
        "ddp": "ddp",
        "fsdp": "fsdp",
        "zero1": "deepspeed",
        "zero2": f"deepspeed:{home}/zero2.json",
        "zero3": f"deepspeed:{home}/zero3.json",
    }


@pytest.fixture(scope="module")
def alone(home: Path) -> Results:
    found = {}
    for name in MODELS:
        found[name] = train(config_of(home, name), home / f"alone-{name}").to_dict()
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "names"),
    [(1, ("fsdp", "zero1")), (2, ("ddp", "fsdp", "zero1", "zero2", "zero3")), (4, ("ddp", "fsdp", "zero2"))],
)
def test_the_same_numbers(home: Path, alone: Results, processes: int, names: tuple[str, ...]) -> None:
    """The same global batch gives the same losses, whatever the number of processes and the strategy."""
    jobs = {
        f"{name} {strategy}": [
            to_dict(config_of(home, name)),
            f"{home}/{name}-{strategy}-{processes}",
            {"how": {"strategy": strategies(home)[strategy]}},
        ]
        for strategy in names
        for name in MODELS
    }
    for job, result in launch(home, processes, jobs).items():
        expected = alone[job.split()[0]]
        for curve in ("curve", "train_curve"):
            steps, losses = zip(*result[curve], strict=True)
            there, wanted = zip(*expected[curve], strict=True)
            assert steps == there
            torch.testing.assert_close(torch.tensor(losses), torch.tensor(wanted), rtol=0, atol=1e-4, msg=job)
        assert result["tokens"] == expected["tokens"] and result["parameters"] == expected["parameters"]


@pytest.mark.slow
def test_runs_go_on_under_any_other_strategy_and_number_of_processes(home: Path) -> None:
    """Eight sittings of each of two runs, across the edge of an epoch (200 windows, 50 steps)."""
    configs = {name: config_of(home, name, steps=60, eval_every=20, log_every=3) for name in ("mla", "moe-bias")}
    wholes = {name: train(config, home / f"whole-{name}") for name, config in configs.items()}
    outs, ways = {name: home / f"travelling-{name}" for name in configs}, strategies(home)
    launches = [
        (0, [("single", 6)]),
        (2, [("fsdp", 15), ("zero1", 21), ("zero3", 27), ("ddp", 33)]),
        (4, [("zero2", 42), ("fsdp", 54)]),
    ]
    for processes, stops in launches:
        jobs = {
            (name, stop): [
                to_dict(config),
                str(outs[name]),
                {"how": {"strategy": ways.get(way, way)}, "stop_at": stop, "resume": True},
            ]
            for name, config in configs.items()
            for way, stop in stops
        }
        for (_, stop), result in launch(home, processes, jobs).items():
            assert f"stopped after step {stop};" in result.get("stopped", ""), result
        for name, out in outs.items():
            assert RunFolder.open(out).newest() == stops[-1][1]
            model, _ = run_folder.load_model(out)  # by one process, whatever wrote it
            assert sum(p.numel() for p in model.parameters()) == wholes[name].parameters
    for name, config in configs.items():
        ends_as(wholes[name], home / f"whole-{name}", train(config, outs[name], resume=True), outs[name])


def ends_as(whole: RunResult, untouched: Path, result: RunResult, out: Path) -> None:
    """A run of 60 steps that travelled has the numbers of one that did not."""
    assert result.status == "done" and [step for step, _ in result.curve] == [20, 40, 60]
    for curve in ("curve", "train_curve"):
        found, expected = (torch.tensor(getattr(run, curve)) for run in (result, whole))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    one, other = RunFolder.open(untouched).load(), RunFolder.open(out).load()
    assert one.model.keys() == other.model.keys() and one.optimizer.keys() == other.optimizer.keys()
    for key, value in one.optimizer.items():
        torch.testing.assert_close(other.optimizer[key], value, rtol=1e-2, atol=1e-5, msg=key)


@pytest.mark.slow
def test_lower_precision_accumulation_and_recomputing(home: Path) -> None:
    """Each together with each strategy, against one process with the same precision. What float16 rounds, it rounds
    alike wherever a row is read; only sums over rows differ, by a few eps (2^-8, 2^-11) of a loss near 3."""
    fields = {
        "bf16": ({"precision": "bf16"}, {}, 0.02),
        "fp16": ({"precision": "fp16"}, {}, 0.005),
        "parts": ({"accumulate": 4, "batch_size": 2}, {}, 1e-4),
        "uneven": ({"accumulate": 3, "batch_size": 2}, {}, 1e-4),
        "again": ({"accumulate": 2, "batch_size": 2}, {"recompute": True}, 1e-4),
    }
    ways, jobs = strategies(home), {}
    for name, (train_fields, how, _) in fields.items():
        for way in ("single", "ddp", "fsdp", "zero2", "zero3"):
            if name != "fp16" or not way.startswith("zero"):
                config = config_of(
                    home, "msla" if name in ("parts", "again") else "mla", **{"steps": 10, **train_fields}
                )
                jobs[name, way] = [to_dict(config), f"{home}/low-{name}-{way}", {"how": {"strategy": ways[way], **how}}]
    found = launch(home, 0, {key: job for key, job in jobs.items() if key[1] == "single"})
    found |= launch(home, 2, {key: job for key, job in jobs.items() if key[1] != "single"})
    for (name, way), result in found.items():
        ours, theirs = (torch.tensor(each["train_curve"]) for each in (result, found[name, "single"]))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=fields[name][2], msg=f"{name} {way}")
        assert result["precision"] == (name if name in ("bf16", "fp16") else "fp32") and not result["skipped"]


@pytest.mark.slow
def test_what_each_process_achieves_is_told_and_a_slow_one_is_named(home: Path) -> None:
    config = config_of(home, "mha", steps=12, log_every=2)
    job = [to_dict(config), f"{home}/slow", {"how": {"peak": 1e12}, "slow": [1, 0.05]}]
    result = launch(home, 2, {"slow": job})["slow"]
    named = [words for words in result["said"] if "falls behind" in words]
    assert len(named) == 1 and named[0].startswith("rank 1 falls behind")
    records = [record for record in RunFolder.open(home / "slow").metrics() if "loss" in record]
    for record in records:
        assert record["tokens_per_s_min"] <= record["tokens_per_s_max"] and record["memory_total"] >= record["memory"]
        assert record["mfu"] == pytest.approx(record["tokens_per_s"] * 3 * result["flops_per_token"] / 2e12)
    beats = sorted(file.name for file in (home / "slow" / "heartbeat").iterdir())
    assert beats == ["rank-00000.json", "rank-00001.json"] and result["processes"] == 2


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="torch.compile needs a C++ compiler")
def test_compiled_steps_of_two_processes(home: Path) -> None:
    config = config_of(home, "mha", steps=3)
    config = replace(config, model=replace(config.model, n_layers=1))
    expected = train(config, home / "uncompiled")
    compiled = to_dict(replace(config, train=replace(config.train, compile=True)))
    jobs = {
        way: [compiled, f"{home}/compiled-{way}", {"how": {"strategy": way}}] for way in ("ddp", "fsdp", "deepspeed")
    }
    for way, result in launch(home, 2, jobs).items():
        found, wanted = torch.tensor(result["train_curve"]), torch.tensor(expected.train_curve)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4, msg=way)


@pytest.mark.slow
def test_a_sharded_checkpoint_is_read_by_one_process(home: Path) -> None:
    """Sampled, evaluated and listed file by file; what is damaged in it is named."""
    config, ways = config_of(home, "mla", steps=5), strategies(home)
    jobs = {way: [to_dict(config), f"{home}/cut-{way}", {"how": {"strategy": ways[way]}}] for way in ("fsdp", "zero3")}
    for way in launch(home, 2, jobs):
        folder = RunFolder.open(home / f"cut-{way}")
        place = folder.path / "step-00000005"
        held = {what: [f"{what}.safetensors", f"{what}.rank-00001.safetensors"] for what in ("model", "optimizer")}
        assert {file.name for file in place.iterdir()} == {
            *held["model"],
            *held["optimizer"],
            "state.json",
            "commit.json",
        }
        sizes = [(place / file).stat().st_size for file in held["optimizer"]]
        assert max(sizes) < 1.5 * min(sizes), "the state is sharded"
        assert sample_run(folder.path, ["the quick "], Sampling(5), device="cpu").tokens == 5
        assert evaluate_source(folder.path, split="train", device="cpu").loss < 4
        exported = pretrained.save(pretrained.load(folder.path), home / f"exported-{way}")
        assert pretrained.load(exported).model.parameter_count() == folder.result().parameters
        rank = place / "model.rank-00001.safetensors"
        rank.write_bytes(rank.read_bytes()[:-1] + b"!")
        with pytest.raises(UserError, match=r"model\.rank-00001\.safetensors is damaged \(its checksum is wrong\)"):
            run_folder.load_model(folder.path)
        rank.unlink()
        with pytest.raises(UserError, match=r"model\.rank-00001\.safetensors is damaged \(it is missing\)"):
            run_folder.load_model(folder.path)


def test_rows_are_divided_among_processes() -> None:
    train = TrainConfig(batch_size=4, accumulate=6)
    assert part_sizes(train, 1) == [4] * 6 and part_sizes(train, 2) == [4] * 3 and part_sizes(train, 3) == [4, 4]
    assert part_sizes(train, 4) == [3, 3] and part_sizes(train, 8) == [3] and part_sizes(train, 12) == [2]
    with pytest.raises(UserError, match=r"24 sequences a step .* among 5 processes: make one of them a multiple of 5"):
        part_sizes(train, 5)


@pytest.mark.parametrize(
    ("strategy", "fields", "said"),
    [
        ("dpp", {}, "unknown strategy 'dpp'.*did you mean 'ddp'"),
        ("fsdp:x.json", {}, "fsdp takes none: leave out ':x.json'"),
        ("deepspeed:none.json", {}, "no such file"),
        ("deepspeed:{home}/fp16.json", {}, "sets fp16, which is --train.precision here"),
        ("deepspeed:{home}/zero0.json", {}, "stage 0: give .* 1, 2 or 3, or --strategy ddp"),
        ("deepspeed:{home}/bare.json", {}, "stage 2: give zero_optimization.stage 1, 2 or 3"),
        ("deepspeed:{home}/offload.json", {}, "offload_optimizer"),
        ("deepspeed:{home}/list.json", {}, "must be an object with fields"),
        ("deepspeed", {"optimizer": "muon"}, "muon needs whole matrices"),
        ("fsdp", {"optimizer": "muon"}, "muon needs whole matrices"),
        ("deepspeed", {"guard": "skip"}, "train.guard skip"),
        ("deepspeed", {"precision": "fp16"}, "train.precision fp16"),
        ("deepspeed:{home}/zero3.json", {"compile": True}, "train.compile cannot see"),
    ],
)
def test_what_a_strategy_refuses(home: Path, strategy: str, fields: dict[str, Any], said: str) -> None:
    for name, content in {
        "fp16": {"fp16": {"enabled": True}},
        "zero0": {"zero_optimization": {"stage": 0}},
        "bare": {"zero_optimization": 2},
        "offload": {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
        "list": [],
    }.items():
        (home / f"{name}.json").write_text(json.dumps(content))
    out = home / "refused"
    shutil.rmtree(out, ignore_errors=True)
    with pytest.raises(UserError, match=said):
        train(config_of(home, "mha", **fields), out, how=Execution(strategy=strategy.format(home=home)))
    assert not torch.distributed.is_initialized()


def test_the_listing_of_the_folder_is_the_registry() -> None:
    """Every file is a strategy that says about itself how it shards, and the help of both commands names it."""
    assert registry.names() == ["single", "ddp", "fsdp", "deepspeed"]
    assert registry.of_several() == ["ddp", "fsdp", "deepspeed"]
    assert [name for name in registry.names() if registry.strategy(name).takes_settings] == ["deepspeed"]
    for name in registry.of_several():
        assert name in (train_help.__doc__ or "") and name in (plan_help.__doc__ or "")
        assert registry.strategy(name).shards("") == registry.strategy(name).sharding


@pytest.mark.parametrize("name", MODELS)
def test_recomputing_changes_no_number(home: Path, name: str) -> None:
    """Activations that are computed again give the same gradients to the bit, dropout and auxiliary losses included."""
    config = config_of(home, name)
    config = replace(config, model=replace(config.model, dropout=0.2))
    found = []
    for recompute in (False, True):
        trainer = Trainer.of(*resolve(config), how=Execution(recompute=recompute))
        steps = [value for step in range(3) for value in train_step(trainer, step)[:2]]
        found.append([*steps, *trainer.model.parameters(), *trainer.model.buffers()])
    assert trainer.model.recompute
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
