"""What a model will cost on GPUs that are not here, before anyone pays: memory, FLOPs, time, and decoding.

Memory and FLOPs of training are counted (`footprint`); what is assumed is said with the result.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..config import RunConfig
from ..errors import UserError
from ..feed_forward import Experts
from ..measure.counters import peak_growth
from ..measure.gpus import Gpu
from ..model import Decoder, attention_configs, cache_floats, flops_per_token
from ..results import Record
from ..training.optimizers import make_optimizers
from .memory import META, Footprint, Part, footprint, on_meta
from .sharding import find_sharding

BF16 = 2  # bytes
USABLE = 0.9  # of a GPU's memory; the rest goes to CUDA, communication and what fragmentation wastes
MFU = 0.4  # of the peak, where nothing is said
MOST_GPUS = 2**16  # that are thought about


@dataclass(frozen=True)
class Machine:
    """What a model is trained on, and how."""

    gpu: Gpu
    gpus: int = 1
    strategy: str = "ddp"
    batch: int | None = None  # sequences on each GPU at a time; None: the config's
    recompute: bool = False  # activation checkpointing: of each layer only the input is kept

    def __post_init__(self) -> None:
        for what, number in (("the number of GPUs", self.gpus), ("the batch", self.batch)):
            if number is not None and number < 1:
                raise UserError(f"{what} is {number}: give 1 or more")
        find_sharding(self.strategy)

    @property
    def usable(self) -> int:
        return round(USABLE * self.gpu.memory)


@dataclass(frozen=True, kw_only=True)
class Memory(Record):
    """Bytes on the fullest GPU, of training. Each part is given at its largest; not all are so at once, and operations
    need room on the way, so that the peak is not their sum."""

    weights: int
    gradients: int
    optimizer: int
    copies: int  # bfloat16 copies of weights
    gathered: int  # whole weights of the layers at work, where weights are sharded
    activations: int
    peak: int


@dataclass(frozen=True, kw_only=True)
class Decoding(Record):
    """One model over all GPUs, split evenly, weights and cache in bfloat16. Sizes in bytes, times in seconds."""

    context: int  # tokens held
    weights: int  # of the whole model
    cache: int  # of one sequence
    batch: int | None  # the largest that fits beside the weights; 0: they do not fit either; None: there is no cache
    seconds: float  # a step of one sequence
    seconds_batch: float | None  # a step of the largest batch


@dataclass(frozen=True, kw_only=True)
class Plan(Record):
    """SI units: bytes, seconds, FLOPs of matrix products."""

    name: str
    mechanism: str
    parameters: int
    gpu: str
    gpus: int
    strategy: str
    precision: str
    recompute: bool
    batch: int  # sequences on each GPU at a time
    context: int  # their tokens
    usable: int  # bytes of each GPU
    memory: Memory
    fits: bool
    remedy: str  # what would fit, where this does not
    tokens: int
    mfu: float
    flops_per_token: float  # of training, what is computed twice included
    flops: float
    seconds: float | None  # None: what these GPUs reach in this precision is not known
    decode: Decoding


def plan(
    config: RunConfig,
    machine: Machine,
    *,
    tokens: float | None = None,
    mfu: float = MFU,
    context: int | None = None,
    advise: bool = True,
) -> Plan:
    """`tokens` to train on; None: as many as the config says. `context`: held while decoding; None: the config's.
    `advise`: look for what would fit, where this does not.

    Raises `UserError` for a model that does not fit together and for numbers that mean nothing.
    """
    model, train = config.model, config.train
    if not 0 < mfu <= 1:
        raise UserError(f"the MFU is {mfu}: it is a share of the peak, above 0 and at most 1")
    budget = train.steps * train.batch_size * train.accumulate * model.context if tokens is None else tokens
    if not 1 <= budget < math.inf:
        raise UserError(f"there are {budget:g} tokens to train on: give 1 or more, such as 300e9")
    sizes = Sizes(config)
    found = sizes.memory(machine)
    fits = found.peak <= machine.usable
    per_token = sizes.training_flops(machine)
    speed = machine.gpus * machine.gpu.flops * mfu
    return Plan(
        name=config.name,
        mechanism=config.mechanism,
        parameters=sizes.parameters,
        gpu=machine.gpu.name,
        gpus=machine.gpus,
        strategy=str(find_sharding(machine.strategy)),
        precision=sizes.precision,
        recompute=machine.recompute,
        batch=sizes.batch(machine),
        context=model.context,
        usable=machine.usable,
        memory=found,
        fits=fits,
        remedy="" if fits or not advise else remedy(sizes, machine),
        tokens=round(budget),
        mfu=mfu,
        flops_per_token=per_token,
        flops=per_token * budget,
        seconds=per_token * budget / speed if sizes.precision != "fp32" else None,
        decode=sizes.decoding(machine, context),
    )


class Sizes:
    """What is known of a model whatever it is trained on. Nothing is counted twice."""

    def __init__(self, config: RunConfig, device: torch.device = META) -> None:
        self.config, self.device = config, device
        self.precision = "bf16" if config.train.precision == "auto" else config.train.precision
        self.model = model = on_meta(config)
        self.parameters = model.parameter_count()
        self.weights = list(model.parameters())
        self.learning = [p for p in self.weights if p.requires_grad]
        self.layers = [sum(p.nbytes for p in layer.parameters()) for layer in model.layers]
        self.taught = [sum(p.nbytes for p in layer.parameters() if p.requires_grad) for layer in model.layers]
        self.states, self.working = optimizer_states(config, model)
        self.steps: dict[tuple[int, bool, bool], Footprint] = {}

    def step(self, batch: int, recompute: bool, accumulated: bool) -> Footprint:
        case = batch, recompute, accumulated
        if case not in self.steps:
            how: dict[str, Any] = {"precision": self.precision, "device": self.device}
            self.steps[case] = footprint(self.config, batch, recompute=recompute, accumulated=accumulated, **how)
        return self.steps[case]

    def rows(self, machine: Machine) -> int:
        """Sequences of a step on each GPU."""
        return -(-self.config.train.batch_size * self.config.train.accumulate // machine.gpus)

    def batch(self, machine: Machine) -> int:
        """Those of them that it takes at a time."""
        return machine.batch or min(self.config.train.batch_size, self.rows(machine))

    def training_flops(self, machine: Machine) -> float:
        """Per token, counted: what kernels compute again for their backward passes is in it."""
        batch = self.batch(machine)
        return self.step(batch, machine.recompute, False).flops / (batch * self.config.model.context)

    def memory(self, machine: Machine) -> Memory:
        """Of a training step, once the optimizer has its state."""
        how, gpus = find_sharding(machine.strategy), machine.gpus
        shards = how.sharded if gpus > 1 else frozenset()
        alone = "gradients" not in shards
        stay = self.rows(machine) > self.batch(machine) or (
            how.buckets and gpus > 1
        )  # gradients, through a forward pass
        step = self.step(self.batch(machine), machine.recompute, stay and alone)

        def kept(what: str, tensors: list[Tensor]) -> int:
            return largest_share(tensors, gpus if what in shards else 1, how.by_rows)

        weights, optimizer = kept("weights", [*self.weights]), kept("optimizer", self.states)
        gradients = sum(p.nbytes for p in self.learning) if alone else kept("gradients", [*self.learning])
        ends = sum(p.nbytes for p in self.weights) - sum(self.layers)
        gathered = ends + sum(sorted(self.layers)[-2:]) if "weights" in shards else 0  # one layer, and the next to come
        there = weights + optimizer + gathered + stay * gradients
        buffers = [0 if alone else size for size in self.taught]
        gone = [size if stay else size - size // gpus for size in buffers]
        return Memory(
            weights=weights,
            gradients=gradients,
            optimizer=optimizer,
            copies=step.copies,
            gathered=gathered,
            activations=step.activations,
            peak=max(there + walk(step, buffers, gone), weights + optimizer + gradients + self.working),
        )

    def decoding(self, machine: Machine, context: int | None = None) -> Decoding:
        """A roofline: a step reads the weights that its tokens meet and every sequence's cache, or it computes,
        whichever takes longer."""
        model, gpu = self.config.model, machine.gpu
        context = model.context if context is None else context
        if context < 1 or (model.positions == "learned" and context > model.context):
            most = f", and at most {model.context}, its learned positions" if model.positions == "learned" else ""
            raise UserError(f"the context to decode at is {context}: give 1 or more{most}")
        weights, cache = BF16 * self.parameters, BF16 * cache_floats(model, context)
        room = machine.gpus * machine.usable - weights
        most_sequences = (None if room >= 0 else 0) if not cache else max(room, 0) // cache
        looked_up = [self.model.place.weight.numel()] if self.model.place is not None else []
        looked_up += [] if model.tied else [self.model.embed.weight.numel()]
        experts = BF16 * sum(e.into.numel() + e.out.numel() for e in self.model.modules() if isinstance(e, Experts))
        always = weights - experts - BF16 * sum(looked_up)
        passed_by = 1 - model.experts_per_token / model.n_experts  # the chance that a token leaves an expert alone
        read = BF16 * sum(layer.cache_spec.read(context) for layer in attention_configs(model))
        flops = flops_per_token(model, context, 1)

        def seconds(batch: int) -> float:
            reading = always + experts * (1 - passed_by**batch) + batch * read
            return max(reading / gpu.bandwidth, batch * flops / gpu.flops) / machine.gpus

        return Decoding(
            context=context,
            weights=weights,
            cache=cache,
            batch=most_sequences,
            seconds=seconds(1),
            seconds_batch=seconds(most_sequences) if most_sequences else None,
        )


def walk(step: Footprint, buffers: list[int], gone: list[int]) -> int:
    """The most that a pass there and back has in use, in bytes, above what was there before.

    `buffers`, `gone`: what the gradients of each layer need while they are spread over the GPUs, and what of them is
    then no longer here.
    """
    now = peak = 0

    def go(part: Part, buffer: int = 0, away: int = 0) -> None:
        nonlocal now, peak
        peak = max(peak, now + part.rise + buffer)
        now += part.change - away

    for layer in (step.embed, *step.layers):
        go(layer.forward)
    go(step.head.forward)
    for layer, buffer, away in reversed([*zip(step.layers, buffers, gone, strict=True)]):
        go(layer.backward, buffer, away)
    go(step.embed.backward)
    return peak


def largest_share(tensors: Iterable[Tensor], gpus: int, by_rows: bool) -> int:
    """Bytes of the largest of equal parts. What is a single number everybody has."""
    tensors = list(tensors)
    numbers = sum(t.nbytes for t in tensors if not t.ndim)
    rest = [t for t in tensors if t.numel() and t.ndim]
    if by_rows:
        return numbers + sum(-(-len(t) // gpus) * (t.nbytes // len(t)) for t in rest)
    return numbers + -(-sum(t.nbytes for t in rest) // gpus)


def optimizer_states(config: RunConfig, model: Decoder) -> tuple[list[Tensor], int]:
    """What the optimizers keep between steps, and the bytes that they need besides while they step."""
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
    optimizers = make_optimizers(config.train, model).values()
    working = 0
    for optimizer in optimizers:
        optimizer.step()
        if "fused" not in optimizer.defaults:  # one that can be fused is, where it counts, and then needs nothing
            working = max(working, peak_growth(optimizer.step, META))
    model.zero_grad()
    found = [s for optimizer in optimizers for state in optimizer.state.values() for s in state.values()]
    return [s for s in found if isinstance(s, Tensor)], working


def remedy(sizes: Sizes, machine: Machine) -> str:
    """The options of the first of the `easier` that fits."""
    for other in easier(machine, sizes.config.train.batch_size):
        if sizes.memory(other).peak <= other.usable:
            return " ".join(
                words
                for words, differs in (
                    (f"--gpus {other.gpus}", other.gpus != machine.gpus),
                    (f"--strategy {other.strategy}", other.strategy != machine.strategy),
                    (f"--batch {other.batch}", other.batch != machine.batch),
                    ("--recompute", other.recompute != machine.recompute),
                )
                if differs
            )
    return ""


def easier(machine: Machine, batch: int) -> Iterator[Machine]:
    """What takes less memory, the least costly first: sharding, computing twice, smaller batches, more GPUs."""
    batch = machine.batch or batch
    if machine.gpus > 1:
        yield (machine := replace(machine, strategy="fsdp"))
    yield (machine := replace(machine, recompute=True))
    while batch > 1:
        batch //= 2
        yield (machine := replace(machine, batch=batch))
    while machine.gpus < MOST_GPUS:
        yield (machine := replace(machine, strategy="fsdp", gpus=2 * machine.gpus))
