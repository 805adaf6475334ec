"""The plan of a training run on GPUs that are not here: memory, FLOPs, time, and decoding.

Memory and FLOPs of training are counted (`footprint`); what is assumed is said with the result.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..config import RunConfig
from ..errors import UserError
from ..feed_forward import Experts
from ..measure.counters import peak_growth
from ..measure.gpus import Gpu
from ..model import Decoder, attention_configs, cache_nbytes, flops_per_token
from ..ranges import Count, Part, Positive, check_fields, checked
from ..results import Record
from ..training.optimizers import make_optimizers
from .memory import META, Footprint, footprint, on_meta
from .sharding import find_sharding

BF16 = 2  # bytes
USABLE = 0.9  # share of a GPU's memory; the rest goes to CUDA, communication and fragmentation
MFU = 0.4  # share of the peak FLOPs that training reaches, where nothing is said
MOST_GPUS = 2**16  # the most that a remedy proposes


@dataclass(frozen=True)
class Machine:
    """The GPUs that a model is trained on, and the strategy. Raises `UserError` for numbers that mean nothing."""

    gpu: Gpu
    gpus: Count = 1
    strategy: str = "ddp"
    batch: Count | None = None  # sequences on each GPU at a time; None: the config's
    recompute: bool = False  # activation checkpointing: of each layer only the input is kept

    def __post_init__(self) -> None:
        check_fields(self)
        find_sharding(self.strategy)

    @property
    def usable(self) -> int:
        """Bytes of each GPU that tensors can take."""
        return round(USABLE * self.gpu.memory)


@dataclass(frozen=True, kw_only=True)
class StepMemory(Record):
    """Bytes on the fullest GPU, in training. Each part is given at its largest.

    The peak is not their sum: not all are largest at once, and operations need memory for their own results.
    """

    weights: int
    gradients: int
    optimizer: int
    copies: int  # bfloat16 copies of weights
    gathered: int  # whole weights of the layers that are computed, where weights are sharded; else 0
    activations: int
    peak: int


@dataclass(frozen=True, kw_only=True)
class DecodingCost(Record):
    """The costs of decoding: one model over all GPUs, split evenly, in bfloat16. Sizes in bytes, times in seconds."""

    context: int  # tokens held
    weights: int  # of the whole model
    cache: int  # of one sequence
    batch: int | None  # the largest that fits beside the weights; 0: they do not fit either; None: there is no cache
    seconds: float  # a step of one sequence
    seconds_batch: float | None  # a step of the largest batch


@dataclass(frozen=True, kw_only=True)
class Plan(Record):
    """The costs of training and decoding, in SI units: bytes, seconds, FLOPs of matrix products."""

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
    memory: StepMemory
    fits: bool
    remedy: str  # options with which training would fit; "": it fits, or nothing was found
    tokens: int  # to train on
    mfu: float  # share of the peak FLOPs that is assumed
    flops_per_token: float  # of training, recomputation included
    flops: float  # of all training
    seconds: float | None  # of all training; None: the peak of these GPUs in this precision is not known
    decode: DecodingCost


@checked
def plan(
    config: RunConfig,
    machine: Machine,
    *,
    tokens: Positive | None = None,
    mfu: Part = MFU,
    context: Count | None = None,
    advise: bool = True,
) -> Plan:
    """Return what training and decoding cost on `machine`.

    `tokens`: to train on (None: as many as the config says). `context`: tokens held while decoding (None: the
    config's). `advise`: look for options with which training would fit, where it does not.

    Raises `UserError` for a model that does not fit together and for numbers that mean nothing.
    """
    model, train = config.model, config.train
    if not 0 < mfu <= 1:
        raise UserError(f"the MFU is {mfu}: it is a share of the peak, above 0 and at most 1")
    budget = train.steps * train.batch_size * train.accumulate * config.length if tokens is None else tokens
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
    """The sizes of a model, on whatever machine it is trained. Each step is counted once."""

    def __init__(self, config: RunConfig, device: torch.device = META) -> None:
        self.config, self.device = config, device
        self.precision = "bf16" if config.train.precision == "auto" else config.train.precision
        self.model = model = on_meta(config)
        self.parameters = model.parameter_count()
        self.weights = list(model.parameters())
        self.trained = [p for p in self.weights if p.requires_grad]
        self.layers = [sum(p.nbytes for p in layer.parameters()) for layer in model.layers]  # bytes of weights
        self.gradients = [sum(p.nbytes for p in layer.parameters() if p.requires_grad) for layer in model.layers]
        self.states, self.working = optimizer_states(config, model)
        self.steps: dict[tuple[int, bool, bool], Footprint] = {}

    def step(self, batch: int, recompute: bool, accumulated: bool) -> Footprint:
        """Return the memory of a step on `batch` sequences, as `footprint` counts it."""
        case = batch, recompute, accumulated
        if case not in self.steps:
            how: dict[str, Any] = {"precision": self.precision, "device": self.device}
            self.steps[case] = footprint(self.config, batch, recompute=recompute, accumulated=accumulated, **how)
        return self.steps[case]

    def rows(self, machine: Machine) -> int:
        """Return the sequences of a step on each GPU."""
        return -(-self.config.train.batch_size * self.config.train.accumulate // machine.gpus)

    def batch(self, machine: Machine) -> int:
        """Return the sequences that each GPU takes at a time."""
        return machine.batch or min(self.config.train.batch_size, self.rows(machine))

    def training_flops(self, machine: Machine) -> float:
        """Return FLOPs per token, counted, with those that kernels compute again for their backward passes."""
        batch = self.batch(machine)
        return self.step(batch, machine.recompute, False).flops / (batch * self.config.length)

    def memory(self, machine: Machine) -> StepMemory:
        """Return the memory of a training step, once the optimizer has its state."""
        sharding = find_sharding(machine.strategy)
        gpus = machine.gpus
        sharded = sharding.sharded if gpus > 1 else frozenset()

        def share(what: str, tensors: Iterable[Tensor]) -> int:
            return largest_share(tensors, gpus if what in sharded else 1, sharding.by_rows)

        weights = share("weights", self.weights)
        optimizer = share("optimizer", self.states)
        gradients = share("gradients", self.trained)
        gathered = self.gathered() if "weights" in sharded else 0

        accumulates = self.rows(machine) > self.batch(machine)
        in_buckets = sharding.buckets and gpus > 1
        gradients_stay = accumulates or in_buckets  # in memory while a forward pass runs
        if "gradients" in sharded:
            step = self.step(self.batch(machine), machine.recompute, accumulated=False)
            buffers = self.gradients  # each layer's are whole until they are spread over the GPUs
        else:
            step = self.step(self.batch(machine), machine.recompute, accumulated=gradients_stay)
            buffers = [0] * len(self.gradients)
        before = weights + optimizer + gathered
        if gradients_stay:
            before += gradients
            freed = buffers  # the GPU's own shard has its memory already
        else:
            freed = [size - size // gpus for size in buffers]
        in_passes = before + walk(step, buffers, freed)
        in_optimizer = weights + optimizer + gradients + self.working
        return StepMemory(
            weights=weights,
            gradients=gradients,
            optimizer=optimizer,
            copies=step.copies,
            gathered=gathered,
            activations=step.activations,
            peak=max(in_passes, in_optimizer),
        )

    def gathered(self) -> int:
        """Return the bytes of whole weights that sharded ones are gathered into: one layer, the next, and the ends."""
        ends = sum(p.nbytes for p in self.weights) - sum(self.layers)
        return ends + sum(sorted(self.layers)[-2:])

    def decoding(self, machine: Machine, context: int | None = None) -> DecodingCost:
        """Return the costs of decoding with `context` tokens held (None: the config's), by a roofline.

        A step takes the time of its reading or of its FLOPs, whichever is longer. It reads the weights that its tokens
        use, and every sequence's cache. Raises `UserError` for a context that the model cannot have.
        """
        model, gpu = self.config.model, machine.gpu
        context = model.context if context is None else context
        if context < 1 or (model.positions == "learned" and context > model.context):
            most = f", and at most {model.context}, its learned positions" if model.positions == "learned" else ""
            raise UserError(f"the context to decode at is {context}: give 1 or more{most}")
        weights = BF16 * self.parameters
        cache = cache_nbytes(model, BF16, context)
        room = machine.gpus * machine.usable - weights
        most_sequences: int | None
        if cache:
            most_sequences = max(room, 0) // cache
        else:
            most_sequences = None if room >= 0 else 0
        looked_up = [self.model.place.weight.numel()] if self.model.place is not None else []
        looked_up += [] if model.tied else [self.model.embed.weight.numel()]
        experts = BF16 * sum(e.into.numel() + e.out.numel() for e in self.model.modules() if isinstance(e, Experts))
        always = weights - experts - BF16 * sum(looked_up)
        unused = 1 - model.experts_per_token / model.n_experts  # the chance that a token does not use an expert
        read = sum(layer.cache_spec.read_nbytes(context, BF16) for layer in attention_configs(model))
        flops = flops_per_token(model, context, 1)

        def seconds(batch: int) -> float:
            reading = always + experts * (1 - unused**batch) + batch * read
            return max(reading / gpu.bandwidth, batch * flops / gpu.flops) / machine.gpus

        return DecodingCost(
            context=context,
            weights=weights,
            cache=cache,
            batch=most_sequences,
            seconds=seconds(1),
            seconds_batch=seconds(most_sequences) if most_sequences else None,
        )


def walk(step: Footprint, buffers: Sequence[int], freed: Sequence[int]) -> int:
    """Return the most bytes that a forward and a backward pass have in use, above those that were in use before.

    `buffers`: by layer, the bytes of the whole gradients while they are spread over the GPUs. `freed`: by layer, the
    bytes of them that are freed afterwards.
    """
    parts = [(layer.forward, 0, 0) for layer in (step.embed, *step.layers, step.head)]
    layers = [*zip(step.layers, buffers, freed, strict=True)]
    parts += [(layer.backward, buffer, away) for layer, buffer, away in reversed(layers)]
    parts.append((step.embed.backward, 0, 0))
    now = peak = 0
    for part, buffer, away in parts:
        peak = max(peak, now + part.rise + buffer)
        now += part.change - away
    return peak


def largest_share(tensors: Iterable[Tensor], gpus: int, by_rows: bool) -> int:
    """Return the bytes of the largest of equal parts, one for each GPU. Single numbers are on every GPU."""
    tensors = list(tensors)
    numbers = sum(t.nbytes for t in tensors if not t.ndim)
    rest = [t for t in tensors if t.numel() and t.ndim]
    if by_rows:
        return numbers + sum(-(-len(t) // gpus) * (t.nbytes // len(t)) for t in rest)
    return numbers + -(-sum(t.nbytes for t in rest) // gpus)


def optimizer_states(config: RunConfig, model: Decoder) -> tuple[list[Tensor], int]:
    """Return the tensors that the optimizers keep between steps, and the bytes that they need besides in a step."""
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
    found: list[Tensor] = []
    working = 0
    for optimizer in make_optimizers(config.train, model).values():
        optimizer.step()
        if "fused" not in optimizer.defaults:  # a fused one needs no memory of its own on a GPU
            working = max(working, peak_growth(optimizer.step, META))
        for state in optimizer.state.values():
            found += [value for value in state.values() if isinstance(value, Tensor)]
    model.zero_grad()
    return found, working


def remedy(sizes: Sizes, machine: Machine) -> str:
    """Return the options of the first of the `easier` machines that fits; "" where none does."""
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
    """Yield machines on which training needs less memory, the least costly change first.

    The changes add up: sharding, recomputation, smaller batches, more GPUs.
    """
    batch = machine.batch or batch
    if machine.gpus > 1:
        yield (machine := replace(machine, strategy="fsdp"))
    yield (machine := replace(machine, recompute=True))
    while batch > 1:
        batch //= 2
        yield (machine := replace(machine, batch=batch))
    while machine.gpus < MOST_GPUS:
        yield (machine := replace(machine, strategy="fsdp", gpus=2 * machine.gpus))
