"""The training loop: it makes the steps (`step.py`) of a run, and reports, validates, guards and saves.

A step depends on the steps before it only by weights and optimizer state. So an interrupted run goes on bit for bit as
if it had not been interrupted, and runs with one seed see the same batches, whatever their mechanism is.
"""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import data
from ..config import Execution, RunConfig
from ..device import find_device, find_precision
from ..errors import UserError
from ..files import alone
from ..measure.counters import reset_peak
from ..measure.gpus import Peak, find_peak
from ..ranges import NotNegative, checked
from ..recording import record_losses
from ..results import RunResult
from ..runs.folder import RunFolder
from ..runs.heartbeat import Heartbeat
from ..runs.launcher import restarted
from ..runs.processes import (
    LocalError,
    Processes,
    StopRequest,
    join_processes,
    leave,
    peer_lost,
    stop_requests,
    unreachable,
)
from ..runs.shield import shielded
from . import strategies
from .guard import REWINDS, USUAL, Diverged, Rewind, diverged, spike_limit
from .limits import check_run, keep_failure, other_threads, resolve
from .log import Log
from .reproducible import deterministic, own_random_state
from .schedule import goes_on, learning_rate
from .step import HOW, Step, Trainer, train_step
from .summary import summary
from .throughput import Account, Laggards, combine
from .trackers import Trackers, check_trackers, open_trackers
from .validation import validate

Listener = Callable[[dict[str, Any]], None]


class Stopped(KeyboardInterrupt):
    """The run was asked to stop; it is saved."""


@checked
def train(
    config: RunConfig,
    out: str | Path,
    *,
    resume: bool = False,
    progress: Listener | None = None,
    how: Execution = HOW,
    patience: NotNegative = 2.0,
) -> RunResult:
    """Train `config` into the run folder `out`. `resume`: go on from its newest checkpoint, if there is one.

    It may go on with other `train.steps` than it began with, where the rates of the steps that are done stay the same.
    The folder is locked. Another process that trains in it is waited for `patience` seconds, then refused.

    `progress` gets {"step", "loss", "val_loss", "tokens_per_s", ...}, some of these fields at a time. After Ctrl-C or
    SIGTERM the step is finished and saved, and `Stopped`, a KeyboardInterrupt, is raised; a second one does not wait.
    Raises `UserError` for what cannot be run, and `Diverged` for a loss that is not finite; the last good checkpoint
    stays. Under a launcher every process makes this call, and the first one writes and reports.
    """
    kind, _ = strategies.find(how.strategy)
    check_trackers(how.track)
    processes = join_processes(find_device(config.train.device), kind.grouped)
    lock = alone(Path(out), "trains in", patience)
    try:
        with ExitStack() as held:
            processes.agree(lambda: held.enter_context(lock) if processes.first else None)
            held.enter_context(own_random_state())
            stop = held.enter_context(stop_requests())
            held.enter_context(deterministic(config.train.deterministic))
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
    stop: StopRequest,
) -> RunResult:
    with stop.at_once():
        config, corpus = processes.agree(lambda: resolve(config))
    check_run(config, processes.size)
    folder = None
    if any(processes.gather((out / "run.json").exists())):
        if resume:
            folder = RunFolder.resume(out, config, corpus, processes, goes_on)
        else:
            folder = RunFolder.create(out, config, corpus, processes)
        result = folder.result()
        if result is not None and result.status == "done" and result.steps >= config.train.steps:
            folder.metrics()  # they are read by whoever asks for the run, so a damaged file is said now
            return result
    device = find_device(config.train.device)
    peak = find_peak(device, find_precision(config.train.precision, device), how.peak)
    reset_peak()
    trainer, log = ready(config, corpus, processes, how, folder)
    if folder is None:  # only now, so that a run that cannot be trained leaves no folder
        folder = RunFolder.create(out, config, corpus, processes)
    tell = progress if progress and processes.first else lambda event: None
    run = Run(trainer, folder, log, stop, tell, peak, how)
    del trainer  # a rewind replaces it, and its memory must then be free
    names = how.track if processes.first else ()
    for words in (*other_threads(folder, device), *(f"opening {name}" for name in names)):
        run.say(words)
    saved = -1 if log.saved is None else log.saved
    with open_trackers(names, out, config, saved, run.say) as run.trackers:
        finished = run.to_end()
        result = run.summary("done" if finished else "interrupted")
        folder.write_result(result)
    if not finished:
        raise Stopped(f"stopped after step {run.log.step}; the run is saved in {out}")
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
    """Return the trainer and the log of the newest checkpoint of `folder`, or of a run that begins.

    `past`: a log of later steps, after a rewind; its counts stay.
    """
    newest = folder.newest() if folder else None
    if folder is None or newest is None:
        trainer = Trainer.of(config, corpus, how, processes)
        log = Log()
    else:
        trainer = Trainer.of(config, corpus, how, processes, folder.stored(newest, "model").all())
        log = Log.of(newest, folder.state(newest))
        stored = folder.stored(newest, "optimizer")
        if newest > log.skipped and not stored.names():
            raise UserError(f"the checkpoint of step {newest} has no optimizer state: train again into another folder")
        trainer.strategy.remember(stored)
    if folder is not None:
        folder.forget_after(-1 if newest is None else newest)
    if past:
        log = replace(log, shift=past.shift, skipped=past.skipped, rewinds=past.rewinds, seconds=past.seconds)
    trainer.scale.factor, trainer.scale.good = log.scale
    return trainer, log


@dataclass
class Run:
    """The steps that are left."""

    trainer: Trainer
    folder: RunFolder
    log: Log
    stop: threading.Event
    tell: Listener
    peak: Peak
    how: Execution
    trackers: Trackers = field(init=False)

    def __post_init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Begin the measurements of a trainer."""
        trainer = self.trainer
        self.account = Account(trainer.config, self.peak, trainer.device, recompute=trainer.model.recompute)
        self.heartbeat = Heartbeat(self.folder.path, trainer.processes.rank, trainer.processes.size)
        self.laggards = Laggards()
        self.unchecked: list[Step] = []  # steps whose numbers have not been checked

    def to_end(self) -> bool:
        """Make the steps that are left, and rewind when `train.guard` says so. Returns what `go` returns."""
        while True:
            try:
                return self.go()
            except Rewind as back:
                self.rewind(back)
            except Diverged as error:
                keep_failure(self.folder, self.log, self.summary("failed", str(error)))
                raise
            except (UserError, OSError) as error:
                if self.trainer.processes.first or isinstance(error, LocalError):
                    raise
                raise LocalError(str(error)) from error

    def rewind(self, back: Rewind) -> None:
        """Go back to the newest checkpoint, and leave out the data of the steps since then."""
        start = self.folder.newest() or 0
        past = replace(self.log, shift=self.log.shift + back.step - start, rewinds=self.log.rewinds + 1)
        old = self.trainer
        self.trainer, self.log = ready(old.config, old.corpus, old.processes, self.how, self.folder, past)
        self.folder.log({"step": start, "rewound_from": back.step, "reason": str(back)})
        self.say(f"{back}: back to step {start}, and its batches are left out")
        self.begin()

    @shielded()
    def go(self) -> bool:
        """Make the steps that are left, and save. Returns False when a request to stop came before the end."""
        self.began = time.perf_counter() - self.log.seconds
        self.trainer.model.train()
        owed = self.owed()
        going = not self.stopped() and (not owed or self.validate())
        while going and self.log.step < self.trainer.config.train.steps:
            going = self.advance() and not self.stopped()
        if going:
            self.save()
            return True
        self.check()
        self.log.seconds = time.perf_counter() - self.began
        self.save()
        return self.log.step == self.trainer.config.train.steps and not self.owed()

    def advance(self) -> bool:
        """Make one step; then report, validate and save if these are due.

        Returns False when a request to stop cut the validation short, which is then still owed.
        """
        trainer = self.trainer
        log = self.log
        config = trainer.config.train
        started = time.perf_counter()
        reports = _due(log.step + 1, config.log_every, config.steps)
        with record_losses() if reports else nullcontext({}) as auxiliary:
            done = train_step(trainer, log.step, log.step + log.shift, self.limit())
        self.unchecked.append(done)
        log.step += 1
        log.tokens += done.tokens
        log.working += done.working
        self.heartbeat.beat(log.step)
        validates = self.validation_due()
        saves = _due(log.step, config.save_every, config.steps)
        watchful = config.guard != "stop" or config.spike > 0
        if reports or validates or saves or watchful:
            self.check()
        seconds = time.perf_counter() - started
        self.account.step(tokens=done.own, seconds=seconds, waited=done.waited, lengths=done.lengths)
        if reports:
            self.report(auxiliary)
        if validates and not self.validate():
            return False
        log.seconds = time.perf_counter() - self.began
        if saves:
            self.save()
        return True

    def stopped(self) -> bool:
        """Return whether any process was asked to stop."""
        return self.trainer.processes.sum(int(self.stop.is_set()))[0] > 0

    def validation_due(self) -> bool:
        """Return whether the model is validated at the step that it has reached."""
        config, step = self.trainer.config, self.log.step
        return _due(step, config.train.eval_every, config.train.steps) if step else bool(config.init)

    def owed(self) -> bool:
        """Return whether the validation of this step was due, and is not on record: a request to stop cut it short."""
        step = self.log.step
        return self.validation_due() and not any(
            record["step"] == step and "val_loss" in record for record in self.folder.metrics()
        )

    def validate(self) -> bool:
        """Validate, and put the loss on record. Returns False when a request to stop cut it short."""
        loss = validate(self.trainer, self.stopped)
        if loss is None:
            return False
        if not math.isfinite(loss):
            self.fault("validation loss", loss, self.log.step)
        self.note({"tokens": self.log.tokens, "val_loss": loss})
        self.tell({"step": self.log.step, "val_loss": loss})
        return True

    def say(self, words: str) -> None:
        """Tell the listener a sentence."""
        self.tell({"step": self.log.step, "say": words})

    def summary(self, status: str, error: str = "") -> RunResult:
        """Return the result of the run; `status`: done, interrupted or failed."""
        return summary(self.trainer, self.folder, self.log, self.peak, status, error)

    def note(self, record: Mapping[str, Any], step: int | None = None) -> None:
        """Add a record of `step` (None: this one) to the metrics and the trackers."""
        step = self.log.step if step is None else step
        self.folder.log({"step": step, **record})
        self.trackers.log(record, step)

    def limit(self) -> float:
        """Return the loss above which a step is a spike; infinite when spikes are not looked for, or not yet."""
        return spike_limit(self.trainer.config.train.spike, self.log.usual)

    def check(self) -> None:
        """Read the numbers of the unchecked steps, which waits for the GPU, and check them.

        This comes before anything is reported or saved.
        """
        if not self.unchecked:
            return
        trainer = self.trainer
        log = self.log
        first = log.step - len(self.unchecked) + 1
        losses = trainer.processes.sum(*torch.stack([step.loss for step in self.unchecked]).tolist())
        norms = torch.stack([step.norm for step in self.unchecked]).tolist()
        steps, self.unchecked = self.unchecked, []
        overflowed = False
        for step, (loss, norm, done) in enumerate(zip(losses, norms, steps, strict=True), first):
            overflow = trainer.scale.used and not done.applied and math.isfinite(loss)  # the scale is then halved
            if not math.isfinite(loss):
                self.fault("loss", loss, step)
            elif loss > self.limit():
                self.fault("loss", loss, step)
            elif not math.isfinite(norm) and not overflow:
                self.fault("gradient norm", norm, step)
            else:
                overflowed = overflowed or overflow
                log.interval.append(loss)
                log.usual = [*log.usual, loss][-USUAL:] if trainer.config.train.spike else []
                log.norm = norm if math.isfinite(norm) else log.norm
        log.scale = (trainer.scale.factor, trainer.scale.good)
        if overflowed and trainer.scale.factor < 1:  # no scale helps
            self.fault("gradient norm", math.inf, log.step)

    def fault(self, what: str, value: float, step: int) -> None:
        """Act on a fault as `train.guard` says: count the step as skipped, or raise `Rewind` or `Diverged`."""
        train, log = self.trainer.config.train, self.log
        reason = f"the {what} became {value:.6g} at step {step} of {train.steps}"
        if train.guard == "skip" and what != "validation loss":
            log.skipped += 1
            self.note({"skipped": reason}, step)
            return
        if train.guard == "rewind" and log.rewinds < REWINDS:
            raise Rewind(reason, step)
        raise diverged(reason, log.rewinds, self.folder.newest(), train)

    def report(self, auxiliary: Mapping[str, list[Tensor]]) -> None:
        """Put the means since the last report on record; `auxiliary`: the auxiliary losses of this step."""
        processes = self.trainer.processes
        log = self.log
        mine, working = zip(*processes.gather((self.account.take(), log.working)), strict=True)
        record = {
            "loss": statistics.fmean(log.interval) if log.interval else None,
            "lr": learning_rate(self.trainer.config.train, log.step - 1),
            "grad_norm": log.norm,
            **combine(mine),
            **{name: statistics.fmean(map(float, values)) for name, values in auxiliary.items()},
        }
        self.note(record if log.warm else record | {"warm_up": True})
        if log.step % self.trainer.config.train.log_every == 0:  # else a longer run goes on with the interval
            log.interval = []
        log.working = 0.0
        log.warm = True
        self.tell({"step": log.step, **record})
        for behind in self.laggards.look(working) if processes.size > 1 else ():
            self.tell({"step": log.step, "say": str(behind)})

    def save(self) -> None:
        """Write a checkpoint of this step, unless there is one."""
        if self.log.saved != self.log.step:
            strategy = self.trainer.strategy
            self.folder.save_pieces(self.log.step, strategy.weights(), strategy.memory(), self.log.state())
            self.log.saved = self.log.step


def _due(step: int, every: int, last: int) -> bool:
    return step % every == 0 or step == last
