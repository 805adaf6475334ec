"""The throughput of training: tokens/s, FLOPs and their share of a peak, waiting, memory; by rank and in total.

FLOPs are those of matrix products, by the mechanisms' own formulas. Attention is counted dense (a causal mask saves
nothing), and a backward pass is two forward passes. MFU counts what the model needs (PaLM, arXiv 2204.02311, app. B);
HFU counts also what is computed a second time to save memory.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import ModelConfig, RunConfig
from ..measure.counters import peak_bytes
from ..measure.gpus import Peak
from ..model import flops_per_token

TRAINING = 3  # cost of a forward and a backward pass, in forward passes


def training_flops(model: ModelConfig, length: int | None = None) -> float:
    """Return the model FLOPs of training, per token of sequences of `length` tokens (None: full context)."""
    return TRAINING * flops_per_token(model, length)


def recomputed_flops(model: ModelConfig, length: int | None = None) -> float:
    """Return the FLOPs per token that the backward pass computes again when layers keep only their inputs.

    That is all but the head, and but the last product of a layer without experts, which only dropout needs.
    """
    spared = 0 if model.dropout else [model.has_experts(i) for i in range(model.n_layers)].count(False)
    return flops_per_token(model, length) - 2 * model.d_model * (model.vocab_size + spared * model.resolved_ff_dim)


def document_lengths(documents: Tensor) -> list[int]:
    """Return the number of tokens of each document of a packed batch (B L, -1: padding)."""
    rows = torch.arange(len(documents), device=documents.device)[:, None] * (int(documents.max()) + 1)
    flat = torch.where(documents < 0, -1, documents + rows).flatten()
    numbers, counts = flat.unique_consecutive(return_counts=True)
    return counts[numbers >= 0].tolist()


class Interval(NamedTuple):
    """The numbers of one rank over some steps. They are plain floats, so that ranks can exchange them as one tensor."""

    tokens: float
    seconds: float
    waited: float  # for data, in seconds; part of `seconds`
    flops: float  # that the model needs; NaN: not known
    executed: float  # FLOPs that were computed, without padding; NaN: not known
    peak: float  # FLOPs per second; NaN: not known
    memory: float  # bytes, the most so far


class Account:
    """The sums of one rank's steps since they were last taken.

    FLOPs are not known when parts of the model are frozen or there is a teacher: the formula would count backward
    passes that are not made, and leave out the teacher.
    """

    def __init__(self, config: RunConfig, peak: Peak | None, device: torch.device, *, recompute: bool = False) -> None:
        """`peak` None: there is no MFU. `recompute`: layers are computed again in the backward pass."""
        self.config = config
        self.peak = peak
        self.device = device
        self.recompute = recompute
        self.known = config.train.train == "all" and not config.teacher
        self._costs: dict[int, tuple[float, float]] = {}
        self._begin()

    def step(self, *, tokens: int, seconds: float, waited: float = 0.0, lengths: Iterable[int] = ()) -> None:
        """Add a step.

        `tokens`: targets that counted. `seconds` of the step, `waited` of them for data. `lengths`: tokens of each
        document that was read, if rows hold whole documents.
        """
        self.tokens += tokens
        self.seconds += seconds
        self.waited += waited
        for length, count in [(n, n) for n in lengths] or [(self.config.length, tokens)]:
            needed, executed = self._cost(length)
            self.flops += count * needed
            self.executed += count * executed

    def take(self) -> Interval:
        """Return the sums since the last call, and begin new ones."""
        found = Interval(
            tokens=self.tokens,
            seconds=self.seconds,
            waited=self.waited,
            flops=self.flops if self.known else math.nan,
            executed=self.executed if self.known else math.nan,
            peak=self.peak.rate if self.peak else math.nan,
            memory=peak_bytes(self.device),
        )
        self._begin()
        return found

    def _begin(self) -> None:
        self.tokens = 0
        self.seconds = 0.0
        self.waited = 0.0
        self.flops = 0.0
        self.executed = 0.0

    def _cost(self, length: int) -> tuple[float, float]:
        """Return the FLOPs per token that the model needs, and those that are computed."""
        if length not in self._costs:
            needed = training_flops(self.config.model, length)
            again = recomputed_flops(self.config.model, length) if self.recompute else 0.0
            self._costs[length] = needed, needed + again
        return self._costs[length]


def combine(intervals: Sequence[Interval]) -> dict[str, float]:
    """Return the record of all ranks together, of `intervals` by rank; numbers that are not known are left out.

    tokens_per_s, flops_per_s: sums, over the time of the slowest rank. mfu, hfu: shares of all peaks together; hfu only
    if more was computed than needed. data_wait: share of the time. memory: bytes of the rank with the most. Several
    ranks also have the least and the most tokens_per_s, the slowest rank, and the memory of all.
    """
    seconds = max(each.seconds for each in intervals)
    if not seconds:
        return {}
    total = Interval(*map(math.fsum, zip(*intervals, strict=True)))
    record = {
        "tokens_per_s": total.tokens / seconds,
        "flops_per_s": total.flops / seconds,
        "mfu": total.flops / seconds / total.peak,
        "data_wait": total.waited / total.seconds,
        "memory": max(each.memory for each in intervals),
    }
    if total.executed > total.flops:
        record["hfu"] = total.executed / seconds / total.peak
    if len(intervals) > 1:
        rates = [each.tokens / each.seconds if each.seconds else math.inf for each in intervals]
        record["tokens_per_s_min"] = min(rates)
        record["tokens_per_s_max"] = max(rates)
        record["slowest_rank"] = max(range(len(intervals)), key=lambda rank: intervals[rank].seconds)
        record["memory_total"] = total.memory
    return {name: value for name, value in record.items() if math.isfinite(value)}


class Behind(NamedTuple):
    """A rank that is slower than the others."""

    rank: int
    seconds: float  # of work in its last interval
    median: float  # of all ranks, in seconds

    def __str__(self) -> str:
        times = self.seconds / self.median if self.median else math.inf
        return f"rank {self.rank} falls behind: {self.seconds:.3g} s of work, {times:.1f} times the median of all ranks"


class Laggards:
    """The ranks that take more than `factor` times the median in `patience` intervals in a row.

    Each is reported once, and again after it has caught up in between. Ranks that wait for each other take equally
    long, so only work before they wait is compared, such as reading data and the forward pass. Of an even number of
    ranks the lower median counts: of two, the faster.
    """

    def __init__(self, factor: float = 1.5, patience: int = 3) -> None:
        self.factor, self.patience = factor, patience
        self.row: dict[int, int] = {}

    def look(self, seconds: Sequence[float]) -> list[Behind]:
        """Return the ranks to report after one interval; `seconds` are those of work, by rank."""
        median = statistics.median_low(seconds)
        slow = [rank for rank, each in enumerate(seconds) if each > self.factor * median]
        self.row = {rank: self.row.get(rank, 0) + 1 for rank in slow}
        return [Behind(rank, seconds[rank], median) for rank in slow if self.row[rank] == self.patience]
