"""Speed and memory: a training step, reading a prompt, one more token. Nothing is timed before its output was checked.

Mechanisms take turns, so that a slow moment of the machine hits all of them, and a time is the median of its repeats.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from . import attention, data
from .cache import Cache
from .config import RunConfig
from .decode import prefill, step
from .device import find_device, find_precision, wait_for
from .errors import UserError, choose
from .match import Options, variant, with_options
from .measure.counters import counted_flops, interleaved, peak_growth, tensor_bytes
from .model import Decoder
from .results import BenchRecord, Record
from .training.step import Trainer, train_step
from .training.train import resolve

Kind = Literal["train", "prefill", "decode"]
Tell = Callable[[str, int, int], None]  # what is being done, how much of it is, and how much there is

BASELINE = "mha"  # what `relative` is relative to
CHUNK = 512  # tokens by which a long cache is filled
CHECKED = 67  # tokens whose logits are compared before anything is timed
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}  # of the largest logit


def bench(
    kind: Kind,
    preset: RunConfig,
    mechanisms: Sequence[str],
    contexts: Sequence[int] | None = None,
    *,
    options: Options | None = None,
    batch: int | None = None,
    repeats: int = 7,
    steps: int = 16,
    progress: Tell | None = None,
) -> list[BenchRecord]:
    """Measure each mechanism in the shape of `preset`, at each context (default: the preset's).

    train: one optimizer step on `batch` sequences (default: the preset's) of `context` tokens, as `train` makes it.
    prefill: reading prompts of `context` tokens into an empty cache. decode: one token after another, of which each
    repeat takes `steps`, the last of them with `context` tokens held; `batch` is 1 by default. A mechanism with several
    modes is measured in each, except in training, which takes the one it takes by itself.

    A record whose outputs were wrong, or that could not run, has an `error` and no time. Peak memory is that of
    tensors: what is resident, and the most that one call adds. `UserError` for an unknown name or too small a number.
    """
    choose("kind", kind, ("train", "prefill", "decode"))
    contexts = (preset.model.context,) if contexts is None else contexts
    numbers = [("repeats", repeats), ("steps", steps), ("batch", 1 if batch is None else batch)]
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
            Case(kind, label, mode, _sized(config, context), batch, min(steps, context - 1), 1)
            for label in mechanisms
            for mode, config in _modes(variant(preset, label, options), split=kind != "train")
        ]
        records += _measure(cases, corpus, repeats, tell)
    return records


@dataclass(frozen=True, eq=False)
class Case:
    """What is to be measured."""

    kind: Kind
    label: str
    mode: str
    config: RunConfig
    batch: int | None
    steps: int  # decode: calls in a repeat
    queries: int  # decode: new tokens in a call

    def __str__(self) -> str:
        return " ".join(filter(None, (self.label, self.mode, f"at {self.config.model.context}")))

    def subject(self, corpus: data.Corpus | None) -> Subject:
        if self.kind == "train":
            assert corpus is not None
            return Training(self, corpus)
        return (Prefilling if self.kind == "prefill" else Decoding)(self)


class Subject(Protocol):
    """A case, ready to be measured. One repeat makes `calls` calls, which process `tokens` tokens."""

    device: torch.device
    dtype: torch.dtype
    batch: int
    calls: int
    tokens: int
    model: Decoder

    def check(self) -> str:
        """What is wrong with its outputs; "" where nothing is."""

    def timed(self) -> float:
        """Seconds of one repeat, preparation left out."""

    def prepare(self) -> Callable[[], object]:
        """Gets one call ready, as uncompiled code, and returns it, to have its FLOPs and memory counted."""

    def resident(self) -> int:
        """Bytes of the tensors that stay between calls."""

    def cache_bytes(self) -> int | None:
        """Live, of the whole batch, after the last repeat; None where there is no cache."""


class Training:
    def __init__(self, case: Case, corpus: data.Corpus) -> None:
        config = case.config
        vocabulary = max(config.model.vocab_size, corpus.vocab_size)
        self.trainer = Trainer.of(
            replace(
                config,
                model=replace(config.model, vocab_size=vocabulary),
                train=replace(config.train, batch_size=case.batch or config.train.batch_size),
            ),
            corpus,
        )
        train = self.trainer.config.train
        self.model, self.device = self.trainer.model, self.trainer.device
        self.dtype = torch.bfloat16 if self.trainer.precision == "bf16" else torch.float32
        self.batch, self.calls = train.batch_size * train.accumulate, 1
        self.tokens = self.batch * config.model.context
        self.counts: list[int] = []  # of each step, where rows of whole documents are not full
        self.step = 0

    def check(self) -> str:
        """The loss, against float64 by the reference kernel, and that all gradients are finite."""
        few = self.trainer.batch(0)[0].rows(0, 2).to(self.device)
        self.model.eval()
        with torch.no_grad():
            exact = reference_twin(self.model).loss(*few).item()
        with self.trainer.autocast():
            loss = self.model.loss(*few)
        loss.backward()
        broken = [n for n, p in self.model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        self.model.train()
        self.model.zero_grad()
        allowed = TOLERANCE[self.dtype] * abs(exact)
        if not abs(loss.item() - exact) <= allowed:  # NaN is not either
            return f"the loss is {loss.item():.6g} and should be {exact:.6g}, give or take {allowed:.1g}"
        return f"the gradient of {broken[0]} is not finite" if broken else ""

    def timed(self) -> float:
        wait_for(self.device)
        began = time.perf_counter()
        done = train_step(self.trainer, self.step)
        wait_for(self.device)
        took = time.perf_counter() - began
        self.step += 1
        self.counts.append(done.tokens)
        self.tokens = round(sum(self.counts) / len(self.counts))
        return took

    def prepare(self) -> Callable[[], object]:
        def uncompiled() -> None:
            with torch.compiler.set_stance("force_eager"):
                train_step(self.trainer, self.step)

        return uncompiled

    def resident(self) -> int:
        states = [s for o in self.trainer.strategy.optimizers.values() for s in o.state.values()]
        moments = [value for state in states for value in state.values() if isinstance(value, Tensor)]
        return tensor_bytes([*self.model.parameters(), *self.model.buffers(), *moments])

    def cache_bytes(self) -> int | None:
        return None


class Inference:
    """A model with random weights, and random tokens: neither changes what a call costs."""

    def __init__(self, case: Case) -> None:
        config = case.config
        self.device = find_device(config.train.device)
        self.dtype = _inference_dtype(config.train.precision, self.device)
        with torch.random.fork_rng([]):
            torch.manual_seed(config.seed)
            self.model = Decoder(config.model).to(self.device, self.dtype).eval()
        self.batch, self.context = case.batch or 1, config.model.context
        draw = torch.Generator().manual_seed(config.seed)
        self.text = torch.randint(config.model.vocab_size, (self.batch, self.context), generator=draw).to(self.device)
        self.after: list[Cache] = []  # the last repeat

    @torch.inference_mode()
    def check(self) -> str:
        """The whole text at once, and in chunks and steps through a cache, against float64 by the reference kernel."""
        text = self.text[:, :CHECKED]
        length = text.shape[1]
        exact = reference_twin(self.model)(text)[0]
        cache, parts = self.model.empty_cache(*text.shape), []
        for part in text.split([length - length // 2, length // 2 - length // 4, *[1] * (length // 4)], 1):
            logits, kept = self.model(part, cache=cache)
            parts.append(logits)
            cache = kept or []
        found = {"at once": self.model(text)[0], "in chunks and steps through the cache": torch.cat(parts, 1)}
        allowed = TOLERANCE[self.dtype] * exact.abs().max().item()
        for how, logits in found.items():
            error = (logits - exact).abs().max().item()
            if not error <= allowed:  # NaN is not either
                return f"the logits of {length} tokens {how} are off by {error:.3g}, and {allowed:.1g} is allowed"
        return ""

    def resident(self) -> int:
        weights = tensor_bytes([*self.model.parameters(), *self.model.buffers()])
        return weights + sum(cache.allocated_bytes() for cache in self.after)

    def cache_bytes(self) -> int | None:
        return sum(cache.nbytes() for cache in self.after)


class Prefilling(Inference):
    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.calls, self.tokens = 1, self.batch * self.context

    @torch.inference_mode()
    def timed(self) -> float:
        call = self.prepare()
        wait_for(self.device)
        began = time.perf_counter()
        self.after = call()
        wait_for(self.device)
        return time.perf_counter() - began

    def prepare(self) -> Callable[[], list[Cache]]:
        with torch.inference_mode():
            cache = self.model.empty_cache(self.batch, self.context)
        return torch.inference_mode()(lambda: prefill(self.model, self.text, cache)[1])


class Decoding(Inference):
    """Each repeat reads the same `queries` times `calls` last tokens of the context; before, the others are held."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.calls, self.queries = case.steps, case.queries
        self.tokens = self.batch * self.calls * self.queries
        self.new = self.text[:, self.context - self.calls * self.queries :].split(self.queries, 1)
        self.held: list[Cache] = []

    def fill(self) -> list[Cache]:
        """By reading text, so that every kind of memory is as text leaves it; forked, to be begun from again."""
        if not self.held:
            self.held = self.model.empty_cache(self.batch, self.context)
            for part in self.text[:, : self.context - self.calls * self.queries].split(CHUNK, 1):
                self.held = prefill(self.model, part, self.held)[1]
        return [cache.fork() for cache in self.held]

    def read(self, tokens: Tensor, cache: list[Cache]) -> list[Cache]:
        if self.queries == 1:
            return step(self.model, tokens[:, 0], cache)[1]
        return prefill(self.model, tokens, cache)[1]

    @torch.inference_mode()
    def timed(self) -> float:
        cache = self.fill()
        wait_for(self.device)
        began = time.perf_counter()
        for tokens in self.new:
            cache = self.read(tokens, cache)
        wait_for(self.device)
        seconds = time.perf_counter() - began
        self.after = cache
        return seconds

    def prepare(self) -> Callable[[], object]:
        """The last call of a repeat: all tokens are held but those it reads."""
        with torch.inference_mode():
            cache = self.fill()
            for tokens in self.new[:-1]:
                cache = self.read(tokens, cache)
        return torch.inference_mode()(lambda: self.read(self.new[-1], cache))


def reference_twin(model: Decoder) -> Decoder:
    """The same weights in float64, through the reference kernel."""
    config = model.config
    options = {name: {**fields, "impl": "reference"} for name, fields in config.options.items()}
    twin = Decoder(replace(config, impl="reference", options=options))
    twin.load_state_dict(model.state_dict())
    return twin.to(next(model.parameters()).device, torch.float64).eval()


def _measure(cases: Sequence[Case], corpus: data.Corpus | None, repeats: int, tell: Tell) -> list[BenchRecord]:
    """Check, then time those that passed, in turns, then count FLOPs and memory."""
    subjects: dict[Case, Subject | None] = {}
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
    base = {r.context: r.ms for r in records if r.mechanism == BASELINE}
    return [
        replace(record, relative=record.ms / mha) if record.ms and (mha := base.get(record.context)) else record
        for record in records
    ]


def _checked(case: Case, corpus: data.Corpus | None) -> tuple[Subject | None, str]:
    """What cannot be made or run (a kernel without gradients, memory that is not there) spoils no other case."""
    try:
        subject = case.subject(corpus)
        return subject, subject.check()
    except (UserError, RuntimeError) as error:
        return None, str(error).splitlines()[0]


def _record(case: Case, subject: Subject | None, seconds: Sequence[float], error: str) -> BenchRecord:
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


def _modes(config: RunConfig, *, split: bool) -> list[tuple[str, RunConfig]]:
    """The ways to compute that its mechanisms declare, or just its own."""
    declared = {name: attention.module(name).Config.modes for name in config.model.mechanisms}
    modes = dict.fromkeys(mode for each in declared.values() for mode in each)
    if not (split and modes):
        return [("", config)]
    return [
        (mode, with_options(config, {name: each[mode] for name, each in declared.items() if mode in each}))
        for mode in modes
    ]


def _sized(config: RunConfig, context: int) -> RunConfig:
    return replace(config, model=replace(config.model, context=context))


def _inference_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Of weights and cache. "auto" is float32 on a CPU, as `sample` runs there."""
    if precision == "auto":
        precision = "fp32" if device.type == "cpu" else find_precision(precision, device)
    return torch.bfloat16 if precision == "bf16" else torch.float32


@dataclass(frozen=True, kw_only=True)
class Crossover(Record):
    """Where one way to compute a mechanism becomes faster than the other."""

    mechanism: str
    axis: str  # context (tokens held while decoding), or queries (new tokens in a call)
    modes: tuple[str, str]
    points: list[tuple[int, float, float]]  # on the axis; ms of the first mode, ms of the second
    at: float | None  # where the winner changes, between two points on logarithmic axes; None: it does not

    def __str__(self) -> str:
        first, last = self.points[0], self.points[-1]
        early, late = (self.modes[point[1] > point[2]] for point in (first, last))
        unit = {"context": "tokens held", "queries": "new tokens per call"}[self.axis]
        if self.at is None:
            return f"{self.mechanism}: {early} is faster at {first[0]} and at {last[0]} {unit}"
        return f"{self.mechanism}: {early} is faster up to {self.at:.0f} {unit}, {late} from there on"


def context_crossovers(records: Sequence[BenchRecord]) -> list[Crossover]:
    """From decode records: the context at which a mechanism's first two modes cost the same."""
    times: dict[str, dict[str, dict[int, float]]] = {}
    for r in records:
        if r.kind == "decode" and r.mode and r.ms is not None:
            times.setdefault(r.mechanism, {}).setdefault(r.mode, {})[r.context] = r.ms
    return [_crossover(label, "context", ways) for label, ways in times.items() if len(ways) > 1]


def query_crossover(
    preset: RunConfig,
    label: str,
    context: int | None = None,
    queries: Sequence[int] = (1, 2, 4, 8, 16, 32, 64),
    *,
    options: Options | None = None,
    repeats: int = 7,
    progress: Tell | None = None,
) -> Crossover:
    """How many new tokens per call make the other mode the faster, with `context` tokens held in the end."""
    config = _sized(variant(preset, label, options), context or preset.model.context)
    modes = _modes(config, split=True)
    if len(modes) < 2:
        raise UserError(f"{label} is computed in one way only: name a mechanism with modes, such as mla")
    counts = [count for count in queries if count < config.model.context]
    cases = [Case("decode", label, mode, way, 1, 1, count) for count in counts for mode, way in modes]
    records = _measure(cases, None, repeats, progress or (lambda what, done, of: None))
    times: dict[str, dict[int, float]] = {}
    for case, record in zip(cases, records, strict=True):
        if record.ms is None:
            raise UserError(f"{case} cannot be measured: {record.error}")
        times.setdefault(case.mode, {})[case.queries] = record.ms
    return _crossover(label, "queries", times)


def _crossover(label: str, axis: str, times: dict[str, dict[int, float]]) -> Crossover:
    (first, a), (second, b) = list(times.items())[:2]
    points = [(x, a[x], b[x]) for x in sorted(a.keys() & b.keys())]
    at = None
    (_, *start), (_, *end) = points[0], points[-1]
    if (start[0] < start[1]) == (end[0] < end[1]):  # where they cross to and fro, that was noise
        return Crossover(mechanism=label, axis=axis, modes=(first, second), points=points, at=None)
    for (x, *before), (y, *after) in pairwise(points):
        low, high = (math.log(p / q) for p, q in (before, after))
        if low * high <= 0 and low != high:
            at = math.exp(math.log(x) + (math.log(y) - math.log(x)) * low / (low - high))
    return Crossover(mechanism=label, axis=axis, modes=(first, second), points=points, at=at)
