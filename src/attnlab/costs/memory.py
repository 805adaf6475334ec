"""What a training step holds in memory, counted: one layer of each kind takes a step between the model's own ends, on
the meta device, where tensors have sizes and no memory, and every tensor is followed from its birth to its end.

So a new mechanism needs no formula. On the meta device code takes the way that it takes on a GPU, and what PyTorch
itself decides by device, `AsOnGpu` decides. Counted on the CPU, the layers really run, through the CPU's kernels.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from ..config import RunConfig
from ..measure.counters import Follow, flop_counter
from ..model import Decoder, attention_configs
from ..training.objective import freeze

META = torch.device("meta")


@dataclass(frozen=True)
class Part:
    """A stretch of a step."""

    change: int = 0  # by how many bytes of tensors more are in use after it than before
    rise: int = 0  # the most that are in use within it, above what was before
    flops: int = 0  # of its matrix products


@dataclass(frozen=True)
class Layer:
    """One kind of layer, or an end of the model."""

    forward: Part
    backward: Part
    copies: int = 0  # bytes of the narrow copies of its weights that its forward pass leaves for the backward pass


@dataclass(frozen=True)
class Footprint:
    """A step: embed, every layer, the head (whose forward part is the loss and the way back to the last layer), every
    layer backwards, embed."""

    embed: Layer
    layers: tuple[Layer, ...]
    head: Layer

    @property
    def flops(self) -> int:
        """Of the matrix products of the step."""
        return sum(layer.forward.flops + layer.backward.flops for layer in (self.embed, *self.layers, self.head))

    @property
    def activations(self) -> int:
        """Bytes that the layers hold for the backward pass, copies of weights left out."""
        return sum(layer.forward.change - layer.copies for layer in (self.embed, *self.layers))

    @property
    def copies(self) -> int:
        """Bytes of those of weights, where they are most."""
        return sum(layer.copies for layer in (self.embed, *self.layers, self.head))


def on_meta(config: RunConfig) -> Decoder:
    """The model, without memory, and with what is not to learn frozen."""
    with META:
        model = Decoder(config.model)
    freeze(model, config.train.train)
    return model


def footprint(
    config: RunConfig,
    batch: int,
    *,
    precision: str = "bf16",
    recompute: bool = False,
    accumulated: bool = False,
    device: torch.device = META,
) -> Footprint:
    """Of a step on `batch` sequences. `recompute`: only its input is kept of a layer, and the layer is run again for
    its backward pass. `accumulated`: gradients are there before, and new ones are added to them."""
    with torch.random.fork_rng([]), device:
        model = Decoder(config.model)
        tokens, targets = (torch.zeros(batch, config.model.context, dtype=torch.int64) for _ in "xy")
    freeze(model, config.train.train)
    if accumulated:
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    order = [f"{layer} {config.model.has_experts(i)}" for i, layer in enumerate(attention_configs(config.model))]
    kinds = list(dict.fromkeys(order))
    stand_in = AsOnGpu(bf16=precision != "fp32", keep=not recompute)
    laps = Laps(stand_in)
    marked: list[nn.Module] = [Mark(laps)]
    for kind in kinds:
        block = model.layers[order.index(kind)]
        marked += [Recomputed(block, stand_in) if recompute else block, Mark(laps)]
    model.layers = nn.ModuleList(marked)
    forward: AbstractContextManager[Any] = stand_in
    if device.type != "meta":
        forward = torch.autocast(device.type, torch.bfloat16, precision != "fp32", cache_enabled=not recompute)
    with laps.counter, laps:
        with forward:
            loss = model.loss(tokens, targets)
        stand_in.forget()
        laps.turn()
        loss.backward()
    parts = laps.layers()
    return Footprint(parts[0], tuple(parts[1 + kinds.index(kind)] for kind in order), parts[-1])


class Laps(Follow):
    """Follows tensors through a step, from mark to mark, and counts FLOPs beside."""

    def __init__(self, stand_in: AsOnGpu) -> None:
        super().__init__()
        self.stand_in, self.counter = stand_in, flop_counter()
        self.start, self.flops = 0, 0
        self.copied = [0]  # at the start, at each mark, and at the loss
        self.there: list[Part] = []  # embed, layers, and at last the head, there and back
        self.back: list[Part] = []  # layers backwards, embed

    def lap(self, parts: list[Part]) -> None:
        flops = self.counter.get_total_flops()
        parts.append(Part(self.now - self.start, self.peak - self.start, flops - self.flops))
        self.start = self.peak = self.now
        self.flops = flops

    def forth(self) -> None:
        self.lap(self.there)
        self.copied.append(self.stand_in.copied)

    def turn(self) -> None:
        self.copied.append(self.stand_in.copied)

    def back_again(self) -> None:
        head_is_done = len(self.there) == len(self.copied) - 1
        self.lap(self.back if head_is_done else self.there)

    def layers(self) -> list[Layer]:
        """Embed, each layer, head."""
        self.back_again()
        copies = [after - before for before, after in pairwise(self.copied)]
        back = self.back + [Part()] * (len(self.there) - 1 - len(self.back))  # below what learns there is no way back
        parts = zip(self.there, [*reversed(back), Part()], copies, strict=True)
        return [Layer(forth, back, made * self.stand_in.keep) for forth, back, made in parts]


class Mark(nn.Module):
    """Stands between two layers, and looks at the memory in use when the pass comes by, in both directions."""

    def __init__(self, laps: Laps) -> None:
        super().__init__()
        self.laps = laps

    def forward(self, x: Tensor, *args: Any) -> tuple[Tensor, None]:
        return _Mark.apply(x, self.laps), None


class _Mark(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, laps: Laps) -> Tensor:
        ctx.laps = laps
        laps.forth()
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.laps.back_again()
        return grads[0], None


class Recomputed(nn.Module):
    def __init__(self, block: nn.Module, stand_in: AsOnGpu) -> None:
        super().__init__()
        self.block, self.stand_in = block, stand_in

    def forward(self, x: Tensor, *args: Any) -> Any:
        real = x.device.type != "meta"

        def around() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
            return nullcontext(), nullcontext() if real else self.stand_in

        return checkpoint(self.block, x, *args, use_reentrant=False, preserve_rng_state=real, context_fn=around)


MULTIPLY = {"linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm", "einsum"}
EXACT = {"softmax", "log_softmax", "layer_norm", "rms_norm", "cross_entropy", "cumsum", "exp", "log", "pow", "sum"}
FUSED = "scaled_dot_product_attention"


class AsOnGpu(TorchFunctionMode):
    """What PyTorch would do on a GPU: attention in a fused kernel, which keeps queries, keys, values, output and one
    number per query; with `bf16`, autocast, whose copies of weights are shared where `keep` is set. A meta tensor has
    no numbers, so all experts are given equally many tokens."""

    def __init__(self, bf16: bool, keep: bool) -> None:
        super().__init__()
        self.bf16, self.keep = bf16, keep
        self.copied = 0  # bytes of copies of weights
        self.kept: dict[int, Tensor] = {}
        self.pairs = 0  # of tokens and experts

    def forget(self) -> None:
        self.kept.clear()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(function, "__name__", ""), kwargs or {}
        if name == "bincount":
            self.pairs = args[0].numel()
            return args[0].new_empty(kwargs["minlength"])
        if name == "tolist":
            each, more = divmod(self.pairs, len(args[0]))
            return [each + (i < more) for i in range(len(args[0]))]
        if self.bf16 and name in MULTIPLY | {FUSED}:
            args, kwargs = torch.utils._pytree.tree_map_only(Tensor, self.narrow, (args, kwargs))
        elif self.bf16 and name in EXACT:
            args, kwargs = torch.utils._pytree.tree_map_only(Tensor, widen, (args, kwargs))
        return fused(*args, **kwargs) if name == FUSED else function(*args, **kwargs)

    def narrow(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            return x
        if id(x) in self.kept:
            return self.kept[id(x)]
        copy = x.to(torch.bfloat16)
        weight = x if x._base is None else x._base  # one expert's are a view
        if isinstance(weight, nn.Parameter):
            self.copied += copy.nbytes
            if self.keep and weight is x:
                self.kept[id(x)] = copy
        return copy


def widen(x: Tensor) -> Tensor:
    return x.float() if x.dtype == torch.bfloat16 else x


def fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor | None = None,
    dropout: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    bias = None if seen is None else torch.zeros_like(seen, dtype=q.dtype).expand(*q.shape[:3], k.shape[2])
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    return kernel(q, k, v, bias, torch.is_grad_enabled(), dropout, is_causal, scale=scale)[0]
