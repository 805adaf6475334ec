"""The schemas of the JSON files of a run folder, as far as they are read."""

from __future__ import annotations

from typing import Annotated, Any, NotRequired, Required, TypedDict

from ..ranges import LARGEST, Count, NotNegative, Positive, Range, Size

MOST = 2**20  # processes of a run
Number = Annotated[int, Range(0, LARGEST)]  # of tokens or steps


class Data(TypedDict):
    """The words of run.json on the text."""

    fingerprint: str
    vocab_size: Count


class About(TypedDict):
    """The content of run.json."""

    key: str
    config: dict[str, Any]
    data: Data
    threads: NotRequired[Count]


class Metrics(TypedDict, total=False):
    """One record of metrics.jsonl."""

    step: Required[Size]
    loss: float | None
    val_loss: float | None
    tokens: Size


class CheckpointState(TypedDict, total=False):
    """The content of state.json of a checkpoint: what `training/log.py` keeps."""

    seconds: NotNegative
    tokens: Number
    interval: list[float]
    usual: list[float]
    shift: Number
    skipped: Number
    rewinds: Number
    scale: tuple[Positive, Number]


class Beat(TypedDict):
    """One heartbeat."""

    time: float  # seconds since 1970
    step: Size
    rank: Annotated[int, Range(0, MOST)]
    ranks: Annotated[int, Range(1, MOST)]
    host: str
    pid: int
