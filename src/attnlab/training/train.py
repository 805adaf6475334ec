"""Training: the steps (`step.py`) of a run, with what is told, validated, guarded against and saved on the way.

A step knows nothing of those before it but weights and optimizer state, so a run that was interrupted goes on bit for
bit as if it had not been, and runs with one seed see the same batches whatever their mechanism is.
"""

from __future__ import annotations

import math
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import data
from ..config import Execution, RunConfig
from ..device import find_device, find_precision
from ..errors import UserError
from ..measure.counters import reset_peak
from ..measure.gpus import Peak, find_peak
from ..measure.throughput import Account, Laggards, combine
from ..recording import record_losses
from ..results import RunResult
from ..runs.folder import RunFolder
from ..runs.heartbeat import Heartbeat
from ..runs.launcher import restarted
from ..runs.processes import LocalError, Processes, join, leave, peer_lost, stop_requests, unreachable
from ..runs.shield import shielded
from . import strategies
from .log import Log
from .optimizers import learning_rate
from .step import HOW, Step, Trainer, dealt, train_step, validate
from .summary import summary
from .trackers import Trackers, check_trackers, open_trackers

Listener = Callable[[dict[str, Any]], None]
USUAL = 50  # losses that say what is usual
REWINDS = 10  # more than so many end a run whose loss keeps rising


class Diverged(UserError):
    """The loss or its gradient is no longer a finite number, or far from what it was."""


class Stopped(KeyboardInterrupt):
    """A request to stop was honoured, and the run is saved."""


class Rewind(Exception):
    """Back to the newest checkpoint, without the batches since then."""

    def __init__(self, reason: str, step: int) -> None:
        super().__init__(reason)
        self.step = step  # whose loss was wrong, from 1


def train(
    config: RunConfig,
    out: str | Path,
    *,
    resume: bool = False,
    progress: Listener | None = None,
    how: Execution = HOW,
) -> RunResult:
    """Train `config` into the run folder `out`; `resume` goes on from its newest checkpoint, if there is one.

    `progress` is told {"step", "loss", "val_loss", "tokens_per_s", ...}, parts of it at a time. Ctrl-C and SIGTERM
    finish the step, save, and raise `Stopped`, a KeyboardInterrupt; a second one does not wait. Raises `UserError` for
    what cannot be run and `Diverged` for a loss that is not finite; the last good checkpoint stays. Under a launcher
    all processes call it alike, and the first one writes and tells.
    """
    kind, _ = strategies.find(how.strategy)
    check_trackers(how.track)
    processes = join(find_device(config.train.device), kind.grouped)
    try:
        with _own_random_state(), stop_requests() as stop, _deterministic(config.train.deterministic):
            try:
                return _train(config, Path(out), resume or restarted(), progress, how, processes, stop)
            except RuntimeError as error:
                if processes.size > 1 and unreachable(error):
                    raise peer_lost(error) from error
                raise
    finally:
        leave(processes)


def _train(
    config: RunConfig,
    out: Path,
    resume: bool,
    progress: Listener | None,
    how: Execution,
    processes: Processes,
    stop: threading.Event,
) -> RunResult:
    config, corpus = processes.agree(lambda: resolve(config))
    dealt(config.train, processes.size)
    folder = None
    if any(processes.gather((out / "run.json").exists())):
        folder = (RunFolder.resume if resume else RunFolder.create)(out, config, corpus, processes)
        result = folder.result()
        if result is not None and result.status == "done":
            return result
    device = find_device(config.train.device)
    peak = find_peak(device, find_precision(config.train.precision, device), how.peak)
    reset_peak()
    trainer, log = ready(config, corpus, processes, how, folder)
    if folder is None:  # only now, so that nothing is left where something cannot be trained
        folder = RunFolder.create(out, config, corpus, processes)
    tell = progress if progress and processes.first else lambda event: None

    def say(words: str) -> None:
        tell({"step": log.step, "say": words})

    names, saved = how.track if processes.first else (), -1 if log.saved is None else log.saved
    if names:
        say(f"opening {', '.join(names)}")
    with open_trackers(names, out, config, saved, say) as trackers:
        while True:
            run = Run(trainer, folder, log, stop, tell, trackers, peak)
            try:
                finished = run.go()
                break
            except Rewind as back:
                start = folder.newest() or 0
                past = replace(log, shift=log.shift + back.step - start, rewinds=log.rewinds + 1)
                trainer, log = ready(config, corpus, processes, how, folder, past)
                folder.log({"step": start, "rewound_from": back.step, "reason": str(back)})
                say(f"{back}: back to step {start}, and its batches are left out")
            except Diverged as error:
                folder.write_result(summary(trainer, folder, log, peak, "failed", str(error)))
                raise
            except (UserError, OSError) as error:
                raise error if processes.first or isinstance(error, LocalError) else LocalError(str(error)) from error
        result = summary(trainer, folder, log, peak, "done" if finished else "interrupted")
        folder.write_result(result)
    if not finished:
        raise Stopped(f"stopped after step {log.step}; the run is saved in {out}")
    return result


@shielded()
def ready(
    config: RunConfig,
    corpus: data.Corpus,
    processes: Processes,
    how: Execution,
    folder: RunFolder | None,
    past: Log | None = None,
) -> tuple[Trainer, Log]:
    """What goes on from the newest checkpoint of `folder`, or begins; `past` is what is known since then."""
    newest = folder.newest() if folder else None
    if folder is None or newest is None:
        trainer, log = Trainer.of(config, corpus, how, processes), Log()
    else:
        trainer = Trainer.of(config, corpus, how, processes, folder.stored(newest, "model").all())
        trainer.strategy.remember(folder.stored(newest, "optimizer"))
        log = Log.of(newest, folder.state(newest))
    if folder is not None:
        folder.forget_after(-1 if newest is None else newest)
    if past:
        log = replace(log, shift=past.shift, skipped=past.skipped, rewinds=past.rewinds, seconds=past.seconds)
    trainer.scale.factor, trainer.scale.good = log.scale
    return trainer, log


def resolve(config: RunConfig) -> tuple[RunConfig, data.Corpus]:
    """The config as it will be run, and its corpus: a vocabulary too small for the text grows to fit it."""
    if not 0 <= config.seed < 2**63:
        raise UserError(f"the seed is {config.seed}; give a whole number from 0 up")
    corpus = data.load(config.data)
    corpus.check(config.model.context)
    if config.model.vocab_size < corpus.vocab_size:
        config = replace(config, model=replace(config.model, vocab_size=corpus.vocab_size))
    return config, corpus


@dataclass
class Run:
    """The steps that are left."""

    trainer: Trainer
    folder: RunFolder
    log: Log
    stop: threading.Event
    tell: Listener
    trackers: Trackers
    peak: Peak
    fresh: list[Step] = field(default_factory=list)  # steps whose numbers have not been looked at

    def __post_init__(self) -> None:
        trainer, processes = self.trainer, self.trainer.processes
        self.account = Account(trainer.config, self.peak, trainer.device, recompute=trainer.model.recompute)
        self.heart = Heartbeat(self.folder.path, processes.rank, processes.size)
        self.laggards = Laggards()

    @shielded()
    def go(self) -> bool:
        """Whether it came to the end; if not, it was asked to stop. Saved either way."""
        trainer, log, config = self.trainer, self.log, self.trainer.config.train
        watchful = config.guard != "stop" or config.spike > 0
        began = time.perf_counter() - log.seconds
        trainer.model.train()
        owed = self.owed()
        while not self.stopped():
            if owed and not self.validate():
                break
            if log.step == config.steps:
                self.save()
                return True
            started = time.perf_counter()
            reports = _due(log.step + 1, config.log_every, config.steps)
            with record_losses() if reports else nullcontext({}) as auxiliary:
                done = train_step(trainer, log.step, log.step + log.shift, self.limit())
            self.fresh.append(done)
            log.step += 1
            log.tokens += done.tokens
            log.alone += done.alone
            self.heart.beat(log.step)
            owed = _due(log.step, config.eval_every, config.steps)
            saves = _due(log.step, config.save_every, config.steps)
            if reports or owed or saves or watchful:
                self.look()
            seconds = time.perf_counter() - started
            self.account.step(tokens=done.own, seconds=seconds, waited=done.waited, lengths=done.lengths)
            if reports:
                self.report(auxiliary)
            if owed and not self.validate():
                break
            owed = False
            log.seconds = time.perf_counter() - began
            if saves:
                self.save()
        self.look()
        log.seconds = time.perf_counter() - began
        self.save()
        return log.step == config.steps and not self.owed()

    def stopped(self) -> bool:
        """Whether any process was asked to stop."""
        return self.trainer.processes.sum(self.stop.is_set())[0] > 0

    def owed(self) -> bool:
        """Whether the model as it is should have been validated, and was not."""
        config, step = self.trainer.config, self.log.step
        due = _due(step, config.train.eval_every, config.train.steps) if step else bool(config.init)
        return due and not any(r["step"] == step and "val_loss" in r for r in self.folder.metrics())

    def validate(self) -> bool:
        """False where it was cut short by a request to stop."""
        loss = validate(self.trainer, self.stopped)
        if loss is None:
            return False
        if not math.isfinite(loss):
            self.wrong("validation loss", loss, self.log.step)
        self.note({"tokens": self.log.tokens, "val_loss": loss})
        self.tell({"step": self.log.step, "val_loss": loss})
        return True

    def note(self, record: Mapping[str, Any], step: int | None = None) -> None:
        step = self.log.step if step is None else step
        self.folder.log({"step": step, **record})
        self.trackers.log(record, step)

    def limit(self) -> float:
        """The loss from which on a step is a spike."""
        spike, usual = self.trainer.config.train.spike, self.log.usual
        return statistics.median(usual) + spike if spike and len(usual) >= USUAL // 5 else math.inf

    def look(self) -> None:
        """Wait for the steps' numbers and refuse what is not right; done before anything is reported or saved."""
        if not self.fresh:
            return
        trainer, log, first = self.trainer, self.log, self.log.step - len(self.fresh) + 1
        losses = trainer.processes.sum(*torch.stack([step.loss for step in self.fresh]).tolist())
        norms = torch.stack([step.norm for step in self.fresh]).tolist()
        steps, self.fresh = self.fresh, []
        overflowed = False
        for step, (loss, norm, done) in enumerate(zip(losses, norms, steps, strict=True), first):
            overflow = trainer.scale.used and not done.applied and math.isfinite(loss)  # float16 will find its scale
            if not math.isfinite(loss):
                self.wrong("loss", loss, step)
            elif loss > self.limit():
                self.wrong("loss", loss, step)
            elif not math.isfinite(norm) and not overflow:
                self.wrong("gradient norm", norm, step)
            else:
                overflowed = overflowed or overflow
                log.interval.append(loss)
                log.usual = [*log.usual, loss][-USUAL:] if trainer.config.train.spike else []
                log.norm = norm if math.isfinite(norm) else log.norm
        log.scale = (trainer.scale.factor, trainer.scale.good)
        if overflowed and trainer.scale.factor < 1:  # no scale helps
            self.wrong("gradient norm", math.inf, log.step)

    def wrong(self, what: str, value: float, step: int) -> None:
        """`train.guard` decides what follows."""
        train, log = self.trainer.config.train, self.log
        reason = f"the {what} became {value:.6g} at step {step} of {train.steps}"
        if train.guard == "skip" and what != "validation loss":
            log.skipped += 1
            self.note({"skipped": reason}, step)
            return
        if train.guard == "rewind" and log.rewinds < REWINDS:
            raise Rewind(reason, step)
        newest = self.folder.newest()
        kept = "no checkpoint was written yet" if newest is None else f"the checkpoint of step {newest} is kept"
        again = f"after {log.rewinds} rewinds" if log.rewinds else ""
        raise Diverged(
            f"{' '.join(filter(None, (reason, again)))}, and {kept}; train again into another folder with a lower "
            f"train.lr (it is {train.lr}), a longer train.warmup ({train.warmup}) or a smaller train.clip "
            f"({train.clip})"
        )

    def report(self, auxiliary: Mapping[str, list[Tensor]]) -> None:
        config, processes, log = self.trainer.config, self.trainer.processes, self.log
        mine, alone = zip(*processes.gather((self.account.take(), log.alone)), strict=True)
        record = {
            "loss": statistics.fmean(log.interval) if log.interval else None,
            "lr": learning_rate(config.train, log.step - 1),
            "grad_norm": log.norm,
            **combine(mine),
            **{name: statistics.fmean(map(float, values)) for name, values in auxiliary.items()},
        }
        self.note(record if log.warm else record | {"warm_up": True})
        log.interval, log.alone, log.warm = [], 0.0, True
        self.tell({"step": log.step, **record})
        for behind in self.laggards.look(alone) if processes.size > 1 else ():
            self.tell({"step": log.step, "say": str(behind)})

    def save(self) -> None:
        if self.log.saved != self.log.step:
            strategy = self.trainer.strategy
            self.folder.save_pieces(self.log.step, strategy.weights(), strategy.memory(), self.log.state())
            self.log.saved = self.log.step


def _due(step: int, every: int, last: int) -> bool:
    return step % every == 0 or step == last


@contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    """Kernels that give the same bits every time, where they are wanted."""
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def _own_random_state() -> Iterator[None]:
    """Leaves the caller's random numbers as they were."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        yield
