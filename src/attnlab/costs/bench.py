"""Measurement of speed and memory: a training step, reading a prompt, one more token.

Nothing is timed before its output was checked. Mechanisms take turns, so that a slow moment of the machine hits all of
them, and a time is the median of its repeats.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .. import attention, data
from ..config import RunConfig
from ..errors import UserError, choose
from ..measure.counters import counted_flops, interleaved, peak_growth
from ..presets import BASELINE, Options, variant, with_options
from ..ranges import Count, check_fields, checked
from ..results import BenchRecord, Tell
from ..training.limits import resolve
from .workloads import Case, Kind, Workload


@dataclass(frozen=True)
class Timing:
    """The number of calls from which a time is taken. The time is the median of the repeats."""

    repeats: Count = 7
    steps: Count = 16  # new tokens in a repeat, when decoding is measured

    def __post_init__(self) -> None:
        check_fields(self)


@checked
def bench(
    kind: Kind,
    preset: RunConfig,
    mechanisms: Sequence[str],
    contexts: Sequence[Count] | None = None,
    *,
    options: Options | None = None,
    batch: Count | None = None,
    timing: Timing = Timing(),
    progress: Tell | None = None,
) -> list[BenchRecord]:
    """Return a record of each mechanism in the shape of `preset`, at each context (default: the preset's).

    train: one optimizer step on `batch` sequences (default: the preset's) of `context` tokens, as `train` makes it.
    prefill: reading prompts of `context` tokens into an empty cache. decode: one token after another, `timing.steps` in
    each repeat, the last of them with `context` tokens held. `batch` is 1 by default for both. A mechanism with several
    modes is measured in each. In training it is measured in the mode that it chooses.

    A record whose outputs were wrong, or that could not run, has an `error` and no time. Peak memory is that of
    tensors: those that stay, and the most that one call adds. Raises `UserError` for an unknown name or too small a
    number.
    """
    choose("kind", kind, ("train", "prefill", "decode"))
    contexts = (preset.model.context,) if contexts is None else contexts
    numbers = [("repeats", timing.repeats), ("steps", timing.steps), ("batch", 1 if batch is None else batch)]
    for what, number in [*numbers, *(("the context", context) for context in contexts)]:
        if number < 1:
            raise UserError(f"{what} is {number}: give 1 or more")
    if not mechanisms:
        raise UserError("there is no mechanism to measure: name at least one; 'attnlab list' shows them")
    corpus = resolve(preset)[1] if kind == "train" else None
    tell = progress or (lambda what, done, of: None)
    records = []
    for context in contexts:
        if corpus is not None:
            corpus.check(context)
        if kind == "decode" and context < 2:
            raise UserError(f"the context is {context}: decoding needs at least 2 tokens, one held and one new")
        cases = [
            Case(kind, label, mode, with_context(config, context), batch, min(timing.steps, context - 1), 1)
            for label in mechanisms
            for mode, config in modes_of(variant(preset, label, options), split=kind != "train")
        ]
        records += measure_cases(cases, corpus, timing.repeats, tell)
    return records


def measure_cases(cases: Sequence[Case], corpus: data.Corpus | None, repeats: int, tell: Tell) -> list[BenchRecord]:
    """Return a record of each case: all are checked, those that passed are timed in turns, then FLOPs are counted."""
    subjects: dict[Case, Workload | None] = {}
    errors: dict[Case, str] = {}
    for number, case in enumerate(cases):
        tell(f"checking {case}", number, len(cases))
        subjects[case], errors[case] = _checked(case, corpus)
    good = [case for case in cases if not errors[case]]
    total = len(good) * (repeats + 1)
    done = iter(range(1, total + 1))

    def timed(case: Case) -> Callable[[], float]:
        subject = subjects[case]
        assert subject is not None

        def call() -> float:
            seconds = subject.timed()
            tell(f"timing {case}", next(done), total)
            return seconds

        return call

    seconds = interleaved({case: timed(case) for case in good}, repeats)
    records = [_record(case, subjects.get(case), seconds.get(case, []), errors[case]) for case in cases]
    baseline = {record.context: record.ms for record in records if record.mechanism == BASELINE}
    return [_relative(record, baseline.get(record.context)) for record in records]


def _relative(record: BenchRecord, baseline: float | None) -> BenchRecord:
    """The record with its time over that of the baseline, both in ms, where both are known."""
    return replace(record, relative=record.ms / baseline) if record.ms and baseline else record


def _checked(case: Case, corpus: data.Corpus | None) -> tuple[Workload | None, str]:
    """The subject of a case, and what is wrong with it. One that cannot be made or run spoils no other case."""
    try:
        subject = case.subject(corpus)
        return subject, subject.check()
    except (UserError, RuntimeError) as error:
        return None, str(error).splitlines()[0]


def _record(case: Case, subject: Workload | None, seconds: Sequence[float], error: str) -> BenchRecord:
    config = case.config
    known: dict[str, Any] = {
        "kind": case.kind,
        "mechanism": case.label,
        "impl": config.model.impl,
        "mode": case.mode,
        "threads": torch.get_num_threads(),
        "context": config.model.context,
        "error": error,
    }
    if subject is None or error:
        return BenchRecord(**known)
    ms = [1e3 * second / subject.calls for second in seconds]
    middle = statistics.median(ms)
    flops = counted_flops(subject.prepare())
    growth = peak_growth(subject.prepare(), subject.device)
    return BenchRecord(
        **known,
        dtype=str(subject.dtype).removeprefix("torch."),
        device=str(subject.device),
        batch=subject.batch,
        tokens_per_s=1e3 * subject.tokens / subject.calls / middle,
        ms=middle,
        ms_spread=[min(ms), max(ms)],
        peak_bytes=subject.resident() + growth,
        cache_bytes=subject.cache_bytes(),
        flops=flops,
        parameters=subject.model.parameter_count(),
        repeats=len(ms),
    )


def modes_of(config: RunConfig, *, split: bool) -> list[tuple[str, RunConfig]]:
    """Return the config in each mode that its mechanisms declare. With `split` unset: in its own, named ""."""
    declared = {name: attention.module(name).Config.modes for name in config.model.mechanisms}
    modes = dict.fromkeys(mode for each in declared.values() for mode in each)
    if not (split and modes):
        return [("", config)]
    return [
        (mode, with_options(config, {name: each[mode] for name, each in declared.items() if mode in each}))
        for mode in modes
    ]


@checked
def with_context(config: RunConfig, context: Count) -> RunConfig:
    """Return `config` with `context` tokens per sequence."""
    return replace(config, model=replace(config.model, context=context))
