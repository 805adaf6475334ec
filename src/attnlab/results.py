"""Results of runs, laws and benchmarks, as JSON records. Pure Python: no framework is imported here."""

from __future__ import annotations

import math
import os
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any, Self

from .errors import UserError, quoted
from .ranges import check_fields, kinds_in

FORMAT = 1


class Record:
    """A dataclass that is one JSON object."""

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain values, ready for JSON."""
        return asdict(self)  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Return the record that `to_dict` made `data` of; fields that are not known here are left out.

        Numbers that are not finite, as Python's JSON has them, become None. Raises `UserError` for a field that is
        missing or of a wrong kind.
        """
        if not isinstance(data, Mapping):
            raise UserError(f"a {cls.__name__} is {quoted(data)}: it must be an object with fields")
        needed = {f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING}  # type: ignore[arg-type]
        if missing := sorted(needed - set(data)):
            raise UserError(f"it lacks {', '.join(missing)}")
        record = cls(**{name: _finite(data[name]) for name, _, _ in kinds_in(cls) if name in data})  # type: ignore[arg-type]
        check_fields(record)
        return record


def _finite(value: Any) -> Any:
    """Return the value with None in place of numbers that are not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return {key: _finite(item) for key, item in value.items()} if isinstance(value, dict) else value


@dataclass(frozen=True, kw_only=True)
class RunResult(Record):
    """One training run. Losses in nats per token, times in seconds, sizes in bytes, FLOPs of matrix products."""

    name: str
    mechanism: str
    seed: int
    key: str
    status: str = "done"  # done, interrupted, failed
    error: str = ""
    parameters: int = 0
    floats_per_token: float = 0.0  # cache floats that each further token adds, all layers
    cache_bytes: int = 0  # cache of one sequence of `context` tokens, all layers, in the dtype of the cache
    flops_per_token: float = 0.0  # of a forward pass at full context
    steps: int = 0
    tokens: int = 0
    context: int = 0
    train_loss: float | None = None
    val_loss: float | None = None
    best_val_loss: float | None = None
    tokens_per_s: float | None = None
    mfu: float | None = None  # model FLOPs per second, as a share of the peak
    peak: str = ""  # the peak, and its origin: a datasheet or a measurement
    data_wait: float | None = None  # share of the time that steps waited for data
    strategy: str = ""
    processes: int = 1
    skipped: int = 0  # steps that the guard did not take
    rewinds: int = 0  # times that the guard went back to a checkpoint
    seconds: float = 0.0
    peak_bytes: int = 0
    precision: str = ""
    impl: str = ""
    threads: int = 0
    device: str = ""
    command: str = ""
    attempts: int = 1  # 2: the run was started again after an error of the machine
    options: dict[str, Any] = field(default_factory=dict)
    curve: list[list[float | None]] = field(default_factory=list)  # [step, validation loss; None: not finite]
    train_curve: list[list[float | None]] = field(default_factory=list)  # [step, training loss; None: not finite]


@dataclass(frozen=True, kw_only=True)
class TaskResult(Record):
    """The answers of one run on a synthetic task to held-out questions. Accuracies are shares, from 0 to 1."""

    task: str
    mechanism: str
    seed: int
    key: str
    status: str = "done"  # done, interrupted, failed
    error: str = ""
    context: int = 0  # tokens of the longest sequences it was trained on
    parameters: int = 0
    steps: int = 0
    seconds: float = 0.0  # of training
    chance: float = 0.0  # the best accuracy of a model that does not see earlier tokens
    accuracy: float | None = None  # share of right answers at `context` tokens
    exact: float | None = None  # share of sequences of `context` tokens without a mistake
    sequences: int = 0  # held-out sequences of each length
    lengths: list[dict[str, float]] = field(default_factory=list)  # length, accuracy, exact, cache_bytes
    depths: list[list[float]] = field(default_factory=list)  # [length, depth from 0 to 1, accuracy]


@dataclass(frozen=True, kw_only=True)
class LawResult(Record):
    """The result of one law for one mechanism."""

    law: str
    mechanism: str
    status: str  # holds, broken, allowed (broken, and that is wanted), n/a
    detail: str = ""
    statement: str = ""


NOT_DECODED = "decoding was not tried: nothing says how one step with a cache is called"


def judged(results: Sequence[LawResult]) -> list[LawResult]:
    """Return the results of laws that apply."""
    return [r for r in results if r.status != "n/a"]


def verdict(results: Sequence[LawResult], longest: int | None = None) -> str:
    """Return one line about all results: which laws are broken, or how many hold, and how far that was tried.

    longest: tokens of the longest sequence that was tried.
    """
    ran = judged(results)
    broken = [r.law for r in ran if r.status == "broken"]
    allowed = [r.law for r in ran if r.status == "allowed"]
    name = results[0].mechanism
    tried = [f"tried up to {longest} tokens"] if longest else []
    if any(r.detail == NOT_DECODED for r in results):
        tried.append("decoding was not tried")
    far = f" ({'; '.join(tried)})" if tried else ""
    but = f" but {', '.join(allowed)}, which may be broken" if allowed else ""
    if broken:
        return f"{name} breaks {len(broken)} of {len(ran)} laws: {', '.join(broken)}{far}"
    return f"{name} obeys all {len(ran)} laws that apply{but}{far}" if ran else f"{name}: no law applies"


@dataclass(frozen=True, kw_only=True)
class BenchRecord(Record):
    """One measurement: the median of interleaved repeats after a warm-up, outputs checked first."""

    kind: str  # train, prefill, decode
    mechanism: str
    impl: str = ""
    mode: str = ""  # the mode of the mechanism, where it has several
    dtype: str = ""
    device: str = ""
    threads: int = 0
    context: int = 0
    batch: int = 1
    tokens_per_s: float | None = None
    ms: float | None = None
    ms_spread: list[float] = field(default_factory=list)  # [fastest, slowest] repeat
    peak_bytes: int | None = None
    cache_bytes: int | None = None  # of rows in use, counted from the tensors
    flops: int | None = None  # counted by PyTorch
    parameters: int = 0
    repeats: int = 0
    relative: float | None = None  # its time divided by the baseline's
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class HeadScores(Record):
    """The scores of the heads of one model: score name -> layers -> heads. heads/scores.py defines each."""

    scores: dict[str, list[list[float]]]
    not_repeated: dict[str, list[list[float]]]  # first null: the same positions in sequences without a repeat
    untrained: dict[str, list[list[float]]]  # second null: the mean of untrained models of the same shape
    p: dict[str, list[list[float]]]  # one-sided p-value before correction, the larger of both nulls
    marked: dict[str, list[list[bool]]]  # above both nulls after Holm's correction over all heads and scores
    alpha: float
    sequences: int
    segments: list[int]  # lengths, in tokens
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Ablation(Record):
    """The loss on repeated random tokens, and its change without each head. Nats per token."""

    loss_by_position: list[float]  # of the token at position 1, 2, ... of a segment and its repeat
    first_half: float
    second_half: float  # below first_half: the model uses the tokens that it saw
    change: list[list[float]]  # layers -> heads: second_half with the head's output at its mean, minus second_half
    change_interval: list[list[list[float]]]  # 95 %, over sequences
    sequences: int
    segment: int
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class EvalResult(Record):
    """The loss of a model on documents, in nats. Padding and ends of documents are no tokens."""

    model: str = ""  # as the user named it
    mechanism: str = ""
    step: int | None = None  # of a run's checkpoint
    data: str = ""
    split: str = ""  # val, test, train; all: a text that has no parts
    seen: float | None = None  # share of its passages that are in the training part too; None: not searched
    context: int
    stride: int
    tokens: int  # each predicted once
    documents: int
    bytes: int | None  # UTF-8 bytes of the text of those tokens
    loss: float  # mean over tokens
    stderr: float | None  # standard error of the loss over documents; None for one document
    perplexity: float
    bits_per_byte: float | None
    by_position: list[list[float]] = field(default_factory=list)  # [first, last, tokens, loss], by tokens seen before
    seconds: float = 0.0
    tokens_per_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Emergence(Record):
    """Head scores during training."""

    steps: list[int]
    scores: dict[str, list[list[list[float]]]]  # score -> checkpoints -> layers -> heads
    first_half: list[float]  # loss on repeated random tokens, nats
    second_half: list[float]
    sequences: int
    segments: list[int]  # lengths, in tokens; the losses are of the longest


def environment() -> dict[str, Any]:
    """Return all that a number depends on: versions, processor, cores, revision. No host name, no path."""

    def version(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    packages = ("attnlab", "torch", "accelerate", "safetensors", "numpy")
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "packages": {name: version(name) for name in packages},
        "revision": _revision(),
    }


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def _revision() -> str | None:
    """The commit this package runs from, when it runs from a checkout of its own."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


Tell = Callable[[str, int, int], None]  # called with what is being done, how much is done, and how much there is
