"""The same run, shared out among processes in every way there is: the same numbers, and it goes on under any other.

Launches are few, because a process takes seconds to start: each does a list of jobs (`crew_worker.py`).
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

from attnlab import checkpoint
from attnlab.checkpoint import RunFolder
from attnlab.config import DataConfig, Execution, ModelConfig, RunConfig, TrainConfig, to_dict
from attnlab.evaluate import evaluate_source
from attnlab.infer import sample_run
from attnlab.spec import UserError
from attnlab.train import Trainer, dealt, resolve, train

TEXT = "the quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs\n" * 40
WORKER = Path(__file__).parent / "crew_worker.py"
MODELS: dict[str, dict[str, Any]] = {
    "mha": {},
    "mla": {"mechanisms": ("mla",)},
    "msla": {"mechanisms": ("msla",), "options": {"msla": {"top_k": 8}}},
    "mka": {"mechanisms": ("mka",)},
    "moe": {"ff": "moe", "n_experts": 3},
    "moe-bias": {"ff": "moe", "n_experts": 3, "balance": "bias"},
}
STEPS = {"msla": 10}  # it selects discretely: what rounding tells apart may be chosen differently
Jobs = dict[str, list[Any]]
Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("strategies")
    (home / "text.txt").write_text(TEXT)
    for stage in (2, 3):
        (home / f"zero{stage}.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    return home


def config_of(home: Path, name: str, **fields: Any) -> RunConfig:
    model = ModelConfig(context=16, n_layers=2, d_model=20, n_heads=2, **MODELS[name])
    train = TrainConfig(
        steps=STEPS.get(name, 50),
        batch_size=4,
        lr=3e-3,
        warmup=5,
        log_every=1,
        eval_every=25,
        eval_batches=3,
        save_every=1000,
        precision="fp32",
        device="cpu",
    )
    return RunConfig(
        name=name, model=model, data=DataConfig(source=f"text:{home}/text.txt"), train=replace(train, **fields), seed=3
    )


def launch(home: Path, processes: int, jobs: Mapping[str, Any], **environment: str) -> Results:
    """What each job came to. No processes: without a launcher."""
    listed = home / f"jobs-{processes}-{len(list(home.iterdir()))}.json"
    listed.write_text(json.dumps(list(jobs.values())))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes else []
    command = [sys.executable, *launcher, str(WORKER), str(listed)]
    env = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=env)
    assert done.returncode == 0, done.stderr[-5000:]
    found = [json.loads(line.removeprefix("RESULT ")) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return dict(zip(jobs, found, strict=True))


def strategies(home: Path) -> dict[str, str]:
    return {
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
    """The same global batch gives the same losses, however many processes read it and whoever holds what."""
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
