"""The result of a run that has ended, as a comparison needs it."""

from __future__ import annotations

import shlex
import statistics
import sys
from pathlib import Path

import torch

from ..device import device_name
from ..measure.counters import peak_bytes
from ..measure.gpus import Peak
from ..model import attention_configs, flops_per_token
from ..results import RunResult
from ..runs.folder import RunFolder
from .log import Log
from .step import Trainer


def summary(trainer: Trainer, folder: RunFolder, log: Log, peak: Peak, status: str, error: str = "") -> RunResult:
    """Return the result of a run; `status`: done, interrupted or failed, with an `error` in one sentence."""

    def middle(name: str) -> float | None:
        values = [r[name] for r in timed if r.get(name) is not None]
        return statistics.median(values) if values else None

    config = trainer.config
    model = trainer.model
    records = folder.metrics()
    curve = [[r["step"], r["val_loss"]] for r in records if "val_loss" in r]
    train_curve = [[r["step"], r["loss"]] for r in records if "loss" in r]
    every = [r for r in records if "tokens_per_s" in r]
    timed = [r for r in every if "warm_up" not in r] or every
    specs = [layer.cache_spec for layer in attention_configs(config.model)]
    context = config.model.context
    return RunResult(
        name=config.name,
        mechanism=config.mechanism,
        seed=config.seed,
        key=config.key,
        status=status,
        error=error,
        parameters=model.parameter_count(),
        floats_per_token=sum(spec.per_token for spec in specs),
        cache_bytes=sum(spec.nbytes(context, next(model.parameters()).element_size()) for spec in specs),
        flops_per_token=flops_per_token(config.model, context),
        steps=log.step,
        tokens=log.tokens,
        context=context,
        train_loss=train_curve[-1][1] if train_curve else None,
        val_loss=curve[-1][1] if curve else None,
        best_val_loss=min((loss for _, loss in curve), default=None),
        tokens_per_s=middle("tokens_per_s"),
        mfu=middle("mfu"),
        peak=str(peak),
        data_wait=middle("data_wait"),
        strategy=trainer.strategy.name,
        processes=trainer.processes.size,
        skipped=log.skipped,
        rewinds=log.rewinds,
        seconds=log.seconds,
        peak_bytes=peak_bytes(trainer.device),
        precision=trainer.precision,
        impl=config.model.impl,
        threads=torch.get_num_threads(),
        device=device_name(trainer.device),
        command=_command(),
        options={name: dict(fields) for name, fields in config.model.options.items()},
        curve=curve,
        train_curve=train_curve,
    )


def _command() -> str:
    program = Path(sys.argv[0]).name
    return shlex.join(["attnlab", *sys.argv[1:]]) if program in ("attnlab", "__main__.py") else ""
