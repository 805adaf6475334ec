"""Calls as Slurm jobs, by submitit. Jobs outlive the driver: their ids are in a file, and the same command finds them
again instead of submitting them twice."""

from __future__ import annotations

import math
import os
import re
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from ..results import read_json, write_json
from ..spec import UserError, need
from .calls import Call, Failure, Listener, Needs, Outcome, Waiting, attempt, cores, torch_threads
from .local import Workers
from .remote import Refused, Remote

SITTINGS = 100  # how often a run may go on in a new job because its time was up
GRACE = 5.0  # seconds until a result that a job wrote is seen here


@dataclass(frozen=True, kw_only=True)
class Slurm:
    """How jobs are submitted."""

    partition: str | None = None  # where jobs queue; None: the cluster's default
    time: str = "4:00:00"  # the most that a job takes, as sbatch reads it; what needs longer goes on in a new job
    account: str | None = None  # who is charged
    sbatch: tuple[str, ...] = ()  # further options of sbatch, without dashes: mem=32G constraint=a100 exclusive
    cluster: Literal["slurm", "local"] = "slurm"  # local: to try it out without Slurm, submitit runs processes here

    def open(self, needs: Needs) -> OnSlurm:
        return OnSlurm(self, needs)


class OnSlurm(Remote):
    """One job for each run; what does not train is small, and made here."""

    pause = 1.0

    def __init__(self, options: Slurm, needs: Needs) -> None:
        self.submitit = need("submitit", "scale")
        self.options, self.cluster = options, options.cluster
        self.folder = (needs.folder / f"jobs-{options.cluster}").absolute()
        self.place = self.folder / {"slurm": "%j", "local": ""}[options.cluster]
        self.threads, self.runs = needs.threads or 1, needs.runs
        self.gpus = int(needs.device != "cpu") if needs.gpus is None else needs.gpus
        self.limit = needs.jobs or {"local": max(1, cores() // self.threads)}.get(options.cluster)
        time, gpus = minutes(options.time), self.gpus or None
        variables = {k: v for k in ("PYTHONPATH",) if (v := os.environ.get(k))} | {"OMP_NUM_THREADS": self.threads}
        self.parameters: dict[str, Any] = {
            "partition": options.partition,
            "time": time,
            "account": options.account,
            "cpus_per_task": self.threads,
            "gpus_per_node": gpus,
            "additional_parameters": dict(map(_line, options.sbatch)) or None,
            "setup": [f"export {name}={shlex.quote(str(value))}" for name, value in variables.items()],
        }
        if options.cluster == "local":
            self.parameters = {"timeout_min": time, "gpus_per_node": gpus}
        self.book: dict[str, str] = {}  # run folder's name -> job id
        if self._file.exists():
            self.book = read_json(self._file)
        self.over: dict[str, float] = {}  # job id -> when it was first seen to have ended

    @property
    def _file(self) -> Path:
        return self.folder / "jobs.json"

    def __enter__(self) -> Self:
        if self.cluster == "slurm" and self.runs and shutil.which("sbatch") is None:
            raise UserError(
                "the engine slurm found no sbatch here: start it on a machine that submits to Slurm; "
                "--dry-run shows the batch file anywhere"
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def executor(self, name: str) -> Any:
        """What submits a job of this name."""
        if self.cluster == "local":
            executor, named = self.submitit.LocalExecutor(self.place), {}
        else:
            executor = _slurm_executor()(self.place, max_num_timeout=SITTINGS)
            named = {"job_name": name}
        executor.update_parameters(**named, **{k: v for k, v in self.parameters.items() if v is not None})
        return executor

    def describe(self, calls: Sequence[Call]) -> str:
        """The batch file of each run, as sbatch would read it: they differ in the name alone."""
        names = [call.folder.name for call in calls if call.folder is not None]
        limit = "" if self.limit is None else f", {self.limit} at a time"
        if self.cluster == "local" or not names:
            return f"as jobs of submitit's local executor{limit}, {self.threads} threads each"
        executor = self.executor(names[0])
        text = executor._make_submission_file_text(executor._submitit_command_str, "")
        others = "\n".join(["", "# the same for", *(f"#   {name}" for name in names[1:])]) if names[1:] else ""
        return f"by sbatch{limit}, each with this file and a name of its own\n\n{text}{others}"

    def begin(self, call: Call) -> tuple[Any, str]:
        assert call.folder is not None
        name = call.folder.name
        if name in self.book:
            job = self._job(self.book[name])
            if not self._over(job):
                return job, f"job {job.job_id}, submitted before"
        absolute = call._replace(arguments=tuple(a.absolute() if isinstance(a, Path) else a for a in call.arguments))
        try:
            job = self.executor(name).submit(Sitting(self.threads), absolute)
        except (self.submitit.core.utils.FailedJobError, self.submitit.core.utils.FailedSubmissionError) as error:
            said = (str(error).strip().splitlines() or ["no reason given"])[-1]
            raise Refused(f"sbatch refused a job ({said}): look at it with --dry-run, and change --slurm.*") from None
        self.book[name] = str(job.job_id)
        write_json(self._file, self.book)
        return job, f"job {job.job_id}"

    def forget(self, call: Call) -> None:
        assert call.folder is not None
        if self.book.pop(call.folder.name, None) is not None:
            write_json(self._file, self.book)

    def _job(self, number: str) -> Any:
        kind = {"local": self.submitit.LocalJob, "slurm": self.submitit.SlurmJob}[self.cluster]
        return kind(self.place, number)

    def _over(self, job: Any) -> bool:
        return job.done() and not (self.cluster == "local" and _lives(job))

    def ended(self, handle: Any) -> tuple[Outcome, Any] | None:
        if not self._over(handle):
            return None
        if handle.paths.result_pickle.exists():
            try:
                found: tuple[Outcome, Any] = handle.result()
                return found
            except self.submitit.core.utils.UncompletedJobError as error:  # what it raised, written down
                return "failed", Failure(f"job {handle.job_id} failed: {_last_error(str(error))}", again=True)
        if time.monotonic() - self.over.setdefault(handle.job_id, time.monotonic()) < GRACE:
            return None
        if handle.state.startswith("CANCELLED"):
            return "interrupted", None
        what = f" ({handle.state})" if self.cluster == "slurm" else ""
        return "failed", Failure(f"job {handle.job_id} ended early{what}: see {handle.paths.stderr}", again=True)

    def interrupt(self, handles: Sequence[Any], *, hard: bool) -> None:
        numbers = " ".join(handle.job_id for handle in handles)
        command = {"slurm": "scancel", "local": "kill"}[self.cluster]
        raise KeyboardInterrupt(f"its jobs are left alone, and '{command} {numbers}' ends them" if numbers else "")

    def _run(self, waiting: Waiting, tell: Listener) -> None:
        if all(call.folder is None for _, call in waiting):
            return Workers(1, self.threads)._run(waiting, tell)
        known = sorted(waiting, key=lambda item: item[1].folder is not None and item[1].folder.name not in self.book)
        waiting.clear()
        waiting.extend(known)  # what was submitted before is found first
        super()._run(waiting, tell)


class Sitting:
    """What a job does. Shortly before its time is up, or when it has to make room, the run saves and the job is queued
    again; whoever is told to end saves and ends without a result."""

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def __call__(self, call: Call) -> tuple[Outcome, Any]:
        import submitit

        number = signal.Signals[f"SIG{submitit.JobEnvironment().USR_SIG}"]
        requeue: Any = signal.getsignal(number)
        asked: list[tuple[int, Any]] = []

        def save(number: int, frame: Any) -> None:
            asked.append((number, frame))
            os.kill(os.getpid(), signal.SIGINT)

        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(number, save)
        with torch_threads(self.threads):
            outcome, value = attempt(call, lambda event: None)
        if outcome == "interrupted":
            if asked:
                requeue(*asked[0])  # leaves the process
            sys.exit(128 + signal.SIGTERM)
        return outcome, value

    def checkpoint(self, call: Call) -> Any:
        """What submitit queues again."""
        import submitit

        return submitit.helpers.DelayedSubmission(self, call)


def minutes(text: str) -> int:
    """The time of sbatch: MINUTES, MINUTES:SECONDS, HOURS:MINUTES:SECONDS, DAYS-HOURS and so on; rounded up."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text.strip())
    if found:
        days, *parts = (None if part is None else int(part) for part in found.groups())
        given = [part for part in parts if part is not None]
        if days is None and len(given) < 3:
            given = [0, *given]  # the first is minutes
        hours, *rest = [*given, 0, 0][:3]
        total = math.ceil((days or 0) * 1440 + hours * 60 + rest[0] + rest[1] / 60)
        if total:
            return total
    raise UserError(f"--slurm.time is {text!r}: give minutes, HOURS:MINUTES:SECONDS or DAYS-HOURS, such as 4:00:00")


def _line(word: str) -> tuple[str, Any]:
    """A further line of the batch file."""
    name, equals, value = word.lstrip("-").partition("=")
    if not re.fullmatch(r"[a-z][a-z-]*", name) or "\n" in value:
        raise UserError(
            f"--slurm.sbatch has {word!r}: give options of sbatch without dashes, such as mem=32G exclusive"
        )
    return name.replace("-", "_"), value if equals else True


def _slurm_executor() -> type[Any]:
    """submitit's, which a machine without Slurm can make too, to show what it would submit."""
    from submitit.slurm.slurm import SlurmExecutor

    class Anywhere(SlurmExecutor):
        @classmethod
        def affinity(cls) -> int:
            return 2

    return Anywhere


def _lives(job: Any) -> bool:
    """Whether a process of submitit's local executor is there: it may be another driver's child."""
    try:
        return b"submitit" in Path(f"/proc/{job.job_id}/cmdline").read_bytes()
    except OSError:
        return False


def _last_error(text: str) -> str:
    """The exception's own line in a traceback that submitit has framed."""
    lines = [line.strip() for line in text.splitlines() if re.match(r"\S*(Error|Exception)\b", line.strip())]
    return lines[-1] if lines else text.strip().splitlines()[0]
