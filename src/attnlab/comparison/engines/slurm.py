"""The engine slurm: calls as Slurm jobs, by submitit.

Jobs outlive the process that submitted them. Their ids are in a file, so that the same command finds them again instead
of submitting them twice.
"""

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

from ...errors import UserError, need
from ...files import read_json, write_json
from ...ranges import check_fields
from .base import Call, Failure, Listener, Needs, Outcome, Waiting, attempt, cores, torch_threads
from .local import Workers
from .remote import Refused, Remote

REQUEUES = 100  # how often a run may go on in a new job because its time was up
GRACE = 5.0  # seconds until a result that a job wrote can be read here


@dataclass(frozen=True, kw_only=True)
class Slurm:
    """The options of the engine slurm."""

    partition: str | None = None  # where jobs queue; None: the cluster's default
    time: str = "4:00:00"  # the most that a job takes, as sbatch reads it; what needs longer goes on in a new job
    account: str | None = None  # who is charged
    sbatch: tuple[str, ...] = ()  # further options of sbatch, without dashes: mem=32G constraint=a100 exclusive
    cluster: Literal["slurm", "local"] = "slurm"  # local: to try it out without Slurm, submitit runs processes here

    def __post_init__(self) -> None:
        check_fields(self)

    def open(self, needs: Needs) -> OnSlurm:
        """Return an engine that has submitted nothing. Raises `UserError` for options that sbatch does not take."""
        return {"slurm": OnSlurm, "local": OnStandIn}[self.cluster](self, needs)


class OnSlurm(Remote):
    """Jobs of Slurm, one for each run. Calls that do not train are small, and made in this process."""

    pause = 1.0
    command = "scancel"  # the command that ends a job

    def __init__(self, options: Slurm, needs: Needs) -> None:
        self.submitit = need("submitit", "scale")
        self.folder = (needs.folder / f"jobs-{options.cluster}").absolute()
        self.limit, self.runs = needs.jobs, needs.runs
        self.threads = needs.threads or 1
        self.gpus = int(needs.device != "cpu") if needs.gpus is None else needs.gpus
        self.minutes = minutes(options.time)
        self.partition, self.account = options.partition, options.account
        self.lines = dict(map(_line, options.sbatch))
        self.book: dict[str, str] = {}  # name of the run folder -> job id
        if self._file.exists():
            self.book = read_book(self._file)
        self.seen: dict[str, float] = {}  # job id -> when it was first found ended without a result, in seconds

    @property
    def _file(self) -> Path:
        return self.folder / "jobs.json"

    def __enter__(self) -> Self:
        if self.runs and shutil.which("sbatch") is None:
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
        """Return submitit's executor, which submits a job of this name."""
        variables = {k: v for k in ("PYTHONPATH",) if (v := os.environ.get(k))} | {"OMP_NUM_THREADS": self.threads}
        given: dict[str, Any] = {
            "job_name": name,
            "partition": self.partition,
            "time": self.minutes,
            "account": self.account,
            "cpus_per_task": self.threads,
            "gpus_per_node": self.gpus or None,
            "additional_parameters": self.lines or None,
            "setup": [f"export {variable}={shlex.quote(str(value))}" for variable, value in variables.items()],
        }
        executor = _slurm_executor()(self.folder / "%j", max_num_timeout=REQUEUES)
        executor.update_parameters(**{field: value for field, value in given.items() if value is not None})
        return executor

    def job(self, number: str) -> Any:
        """Return the job of this id."""
        return self.submitit.SlurmJob(self.folder / "%j", number)

    def over(self, job: Any) -> bool:
        """Return whether a job has ended."""
        return bool(job.done())

    def describe(self, calls: Sequence[Call]) -> str:
        """Return the batch file of the runs, as sbatch would read it: they differ in the name alone."""
        names = [call.folder.name for call in calls if call.folder is not None]
        executor = self.executor(names[0])
        text = executor._make_submission_file_text(executor._submitit_command_str, "")
        others = "\n".join(["", "# the same for", *(f"#   {name}" for name in names[1:])]) if names[1:] else ""
        limit = "" if self.limit is None else f", {self.limit} at a time"
        return f"by sbatch{limit}, each with this file and a name of its own\n\n{text}{others}"

    def begin(self, call: Call) -> tuple[Any, str]:
        """Submit a call as a job, or find the job that was submitted before."""
        assert call.folder is not None
        name = call.folder.name
        if name in self.book:
            job = self.job(self.book[name])
            if not self.over(job):
                return job, f"job {job.job_id}, submitted before"
        absolute = call._replace(arguments=tuple(a.absolute() if isinstance(a, Path) else a for a in call.arguments))
        try:
            job = self.executor(name).submit(JobCall(self.threads), absolute)
        except (self.submitit.core.utils.FailedJobError, self.submitit.core.utils.FailedSubmissionError) as error:
            said = (str(error).strip().splitlines() or ["no reason given"])[-1]
            raise Refused(f"sbatch refused a job ({said}): look at it with --dry-run, and change --slurm.*") from None
        self.book[name] = str(job.job_id)
        write_json(self._file, self.book)
        return job, f"job {job.job_id}"

    def forget(self, call: Call) -> None:
        """Drop the job id of a call that has ended."""
        assert call.folder is not None
        del self.book[call.folder.name]
        write_json(self._file, self.book)

    def ended(self, handle: Any) -> tuple[Outcome, Any] | None:
        """Return how a job ended; None: not yet, or its result may still appear."""
        if not self.over(handle):
            return None
        if handle.paths.result_pickle.exists():
            try:
                found: tuple[Outcome, Any] = handle.result()
                return found
            except self.submitit.core.utils.UncompletedJobError as error:  # the error that the call raised
                return "failed", Failure(f"job {handle.job_id} failed: {_last_error(str(error))}", again=True)
        if time.monotonic() - self.seen.setdefault(handle.job_id, time.monotonic()) < GRACE:
            return None
        if handle.state.startswith("CANCELLED"):
            return "interrupted", None
        said = f"job {handle.job_id} ended without a result ({handle.state}): see {handle.paths.stderr}"
        return "failed", Failure(said, again=True)

    def interrupt(self, handles: Sequence[Any], *, hard: bool) -> None:
        """Leave the jobs alone, and say how to end them. Raises `KeyboardInterrupt`."""
        numbers = " ".join(handle.job_id for handle in handles)
        raise KeyboardInterrupt(f"its jobs are left alone, and '{self.command} {numbers}' ends them" if numbers else "")

    def _run(self, waiting: Waiting, tell: Listener) -> None:
        if all(call.folder is None for _, call in waiting):
            return Workers(1, self.threads)._run(waiting, tell)
        found_first = sorted(waiting, key=lambda item: item[1].folder is None or item[1].folder.name not in self.book)
        waiting.clear()
        waiting.extend(found_first)
        super()._run(waiting, tell)


class OnStandIn(OnSlurm):
    """Jobs of submitit's local executor: processes here, which outlive the one that submitted them too."""

    command = "kill"

    def __init__(self, options: Slurm, needs: Needs) -> None:
        super().__init__(options, needs)
        self.limit = self.limit or max(1, cores() // self.threads)

    def __enter__(self) -> Self:
        return self

    def executor(self, name: str) -> Any:
        """Return submitit's local executor."""
        executor = self.submitit.LocalExecutor(self.folder)
        executor.update_parameters(timeout_min=self.minutes, gpus_per_node=self.gpus)
        return executor

    def job(self, number: str) -> Any:
        """Return the job of this process id."""
        return self.submitit.LocalJob(self.folder, number)

    def over(self, job: Any) -> bool:
        """Return whether a job has ended. submitit knows that of its own children alone; others are looked up."""
        try:
            there = b"submitit" in Path(f"/proc/{job.job_id}/cmdline").read_bytes()
        except OSError:
            there = False
        return bool(job.done()) and not there

    def describe(self, calls: Sequence[Call]) -> str:
        """Return how many jobs run side by side, in words."""
        return f"by submitit's local executor, {self.limit} at a time, {self.threads} threads each"


class JobCall:
    """The function of a job: it makes a call.

    Shortly before its time is up, or when it has to make room, the run saves and the job is queued again. A job that is
    cancelled saves and ends without a result.
    """

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
        """Return the job that submitit queues again."""
        import submitit

        return submitit.helpers.DelayedSubmission(self, call)


def minutes(text: str) -> int:
    """Return the minutes of a time as sbatch reads it, rounded up. Raises `UserError` for anything else.

    MINUTES, MINUTES:SECONDS, HOURS:MINUTES:SECONDS, DAYS-HOURS, DAYS-HOURS:MINUTES, DAYS-HOURS:MINUTES:SECONDS.
    """
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


def read_book(path: Path) -> dict[str, str]:
    """Return the id of each job, by the name of its run folder. `UserError` for ids that could name other folders."""
    again = "delete it, and jobs are submitted anew"
    held: dict[str, str] = read_json(path, dict[str, str], again)
    if not all(re.fullmatch(r"\w+", each) for each in held.values()):
        raise UserError(f"{path} does not list ids of jobs: it was changed; {again}")
    return held


def _line(word: str) -> tuple[str, Any]:
    """Return the name and the value of a further option of sbatch."""
    name, equals, value = word.lstrip("-").partition("=")
    if not re.fullmatch(r"[a-z][a-z-]*", name) or "\n" in value:
        raise UserError(
            f"--slurm.sbatch has {word!r}: give options of sbatch without dashes, such as mem=32G exclusive"
        )
    return name.replace("-", "_"), value if equals else True


def _slurm_executor() -> type[Any]:
    """Return submitit's executor, made usable on a machine without Slurm, to show what it would submit."""
    from submitit.slurm.slurm import SlurmExecutor

    class Anywhere(SlurmExecutor):
        @classmethod
        def affinity(cls) -> int:
            return 2

    return Anywhere


def _last_error(text: str) -> str:
    """Return the last exception's own line in a traceback that submitit has framed."""
    lines = [line.strip() for line in text.splitlines() if re.match(r"\S*(Error|Exception)\b", line.strip())]
    return lines[-1] if lines else text.strip().splitlines()[0]
