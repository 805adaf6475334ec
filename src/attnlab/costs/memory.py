"""The memory of a training step, counted.

One layer of each kind takes a step between the model's embedding and head. It does so on the meta device, where tensors
have sizes and no memory. Every tensor is followed from where it is made to where it is freed. So a new mechanism needs
no formula. On the meta device code takes the branch that it takes on a GPU, and `AsOnGpu` decides what PyTorch itself
decides by device. Counted on the CPU, the layers really run, through the CPU's kernels.
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
from ..ranges import Count, checked
from ..training.objective import freeze

META = torch.device("meta")


@dataclass(frozen=True)
class Part:
    """The forward or the backward pass of one layer, in a step."""

    change: int = 0  # bytes of tensors in use after it, minus those before it
    rise: int = 0  # the most bytes in use within it, minus those before it
    flops: int = 0  # of its matrix products


@dataclass(frozen=True)
class LayerMemory:
    """The two passes of one kind of layer, of the embedding, or of the head."""

    forward: Part
    backward: Part
    copies: int = 0  # bytes of bfloat16 copies of its weights that its forward pass keeps for the backward pass


@dataclass(frozen=True)
class Footprint:
    """The passes of a step, in this order: forward through embed, layers and head; backward through layers and embed.

    The backward pass of the head is counted in its forward part.
    """

    embed: LayerMemory
    layers: tuple[LayerMemory, ...]
    head: LayerMemory

    @property
    def flops(self) -> int:
        """FLOPs of the matrix products of the step."""
        return sum(layer.forward.flops + layer.backward.flops for layer in (self.embed, *self.layers, self.head))

    @property
    def activations(self) -> int:
        """Bytes that the layers hold for the backward pass, copies of weights left out."""
        return sum(layer.forward.change - layer.copies for layer in (self.embed, *self.layers))

    @property
    def copies(self) -> int:
        """Bytes of bfloat16 copies of weights, where they are most."""
        return sum(layer.copies for layer in (self.embed, *self.layers, self.head))


def on_meta(config: RunConfig) -> Decoder:
    """Return the model on the meta device, with the weights frozen that are not to be trained."""
    with META:
        model = Decoder(config.model)
    freeze(model, config.train.train)
    return model


@checked
def footprint(
    config: RunConfig,
    batch: Count,
    *,
    precision: str = "bf16",
    recompute: bool = False,
    accumulated: bool = False,
    device: torch.device = META,
) -> Footprint:
    """Return the memory of a step on `batch` sequences.

    `precision`: "bf16" or "fp32". `recompute`: only the input of a layer is kept, and the layer is run again for its
    backward pass. `accumulated`: gradients are there before the step, and new ones are added to them.
    """
    with torch.random.fork_rng([]), device:
        model = Decoder(config.model)
        tokens, targets = (torch.zeros(batch, config.length, dtype=torch.int64) for _ in "xy")
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
        laps.mark_loss()
        loss.backward()
    parts = laps.layers()
    return Footprint(parts[0], tuple(parts[1 + kinds.index(kind)] for kind in order), parts[-1])


class Laps(Follow):
    """The memory and the FLOPs of a step, cut into parts where the passes meet a `Mark`."""

    def __init__(self, stand_in: AsOnGpu) -> None:
        super().__init__()
        self.stand_in = stand_in
        self.counter = flop_counter()
        self.start = 0  # bytes in use at the last cut
        self.flops = 0  # counted at the last cut
        self.copied = [0]  # bytes of copies of weights: at the start, at each mark, and at the loss
        self.forward: list[Part] = []  # embed, then each layer
        self.head: Part | None = None  # with its backward pass
        self.backward: list[Part] = []  # the last layer first, embed last

    def cut(self) -> Part:
        """Return the part of the step since the last cut."""
        flops = self.counter.get_total_flops()
        part = Part(self.now - self.start, self.peak - self.start, flops - self.flops)
        self.start = self.peak = self.now
        self.flops = flops
        return part

    def mark_forward(self) -> None:
        """Cut where the forward pass leaves embed or a layer."""
        self.forward.append(self.cut())
        self.copied.append(self.stand_in.copied)

    def mark_loss(self) -> None:
        """Note the copies of weights where the forward pass ends."""
        self.copied.append(self.stand_in.copied)

    def mark_backward(self) -> None:
        """Cut where the backward pass leaves the head, which is first, or a layer."""
        part = self.cut()
        if self.head is None:
            self.head = part
        else:
            self.backward.append(part)

    def layers(self) -> list[LayerMemory]:
        """Return embed, each layer, and the head, once the backward pass has ended."""
        self.mark_backward()
        assert self.head is not None
        frozen = len(self.forward) - len(self.backward)  # frozen layers below all others get no backward pass
        backward = [*[Part()] * frozen, *reversed(self.backward), Part()]
        copies = [after - before for before, after in pairwise(self.copied)]
        if not self.stand_in.keep:
            copies = [0] * len(copies)
        return [LayerMemory(*parts) for parts in zip([*self.forward, self.head], backward, copies, strict=True)]


class Mark(nn.Module):
    """A mark between two layers: the memory in use is noted when a pass goes through it, in both directions."""

    def __init__(self, laps: Laps) -> None:
        super().__init__()
        self.laps = laps

    def forward(self, x: Tensor, *args: Any) -> tuple[Tensor, None]:
        """Return `x` and no cache, as a layer does."""
        return _Mark.apply(x, self.laps), None


class _Mark(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, laps: Laps) -> Tensor:
        ctx.laps = laps
        laps.mark_forward()
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.laps.mark_backward()
        return grads[0], None


class Recomputed(nn.Module):
    """A layer of which only the input is kept: it is run again in the backward pass."""

    def __init__(self, block: nn.Module, stand_in: AsOnGpu) -> None:
        super().__init__()
        self.block, self.stand_in = block, stand_in

    def forward(self, x: Tensor, *args: Any) -> Any:
        """Return what the layer returns."""
        real = x.device.type != "meta"

        def around() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
            return nullcontext(), nullcontext() if real else self.stand_in

        return checkpoint(self.block, x, *args, use_reentrant=False, preserve_rng_state=real, context_fn=around)


MULTIPLY = {"linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm", "einsum"}
EXACT = {"softmax", "log_softmax", "layer_norm", "rms_norm", "cross_entropy", "cumsum", "exp", "log", "pow", "sum"}
FUSED = "scaled_dot_product_attention"


class AsOnGpu(TorchFunctionMode):
    """A mode in which PyTorch computes as on a GPU.

    Attention runs in a fused kernel, which keeps queries, keys, values, output and one number per query. `bf16` is
    autocast, and `keep` says that a copy of a weight is made once and shared. A meta tensor has no numbers, so all
    experts are given equally many tokens.
    """

    def __init__(self, bf16: bool, keep: bool) -> None:
        super().__init__()
        self.bf16, self.keep = bf16, keep
        self.copied = 0  # bytes of copies of weights
        self.kept: dict[int, Tensor] = {}  # id of a weight -> its copy
        self.pairs = 0  # of tokens and experts
        self.marks: list[torch.autocast] = []

    def __enter__(self) -> Any:
        """Compute as on a GPU from here on. On meta nothing is narrowed by autocast itself: it marks where it is on."""
        self.marks.append(torch.autocast("cpu", torch.bfloat16, self.bf16))
        self.marks[-1].__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        """Compute as before."""
        super().__exit__(*error)
        self.marks.pop().__exit__(*error)

    def forget(self) -> None:
        """Drop the copies of weights, as autocast does where it ends."""
        self.kept.clear()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        kwargs = kwargs or {}
        if name == "bincount":
            self.pairs = args[0].numel()
            return args[0].new_empty(kwargs["minlength"])
        if name == "tolist":
            each, more = divmod(self.pairs, len(args[0]))
            return [each + (i < more) for i in range(len(args[0]))]
        narrows = self.bf16 and torch.is_autocast_enabled("cpu")  # a mechanism may turn it off
        if narrows and name in MULTIPLY | {FUSED}:
            args, kwargs = torch.utils._pytree.tree_map_only(Tensor, self.narrow, (args, kwargs))
        elif narrows and name in EXACT:
            args, kwargs = torch.utils._pytree.tree_map_only(Tensor, widen, (args, kwargs))
        return fused_attention(*args, **kwargs) if name == FUSED else function(*args, **kwargs)

    def narrow(self, x: Tensor) -> Tensor:
        """Return `x` in bfloat16 where it is float32; the copy of a weight is made once where `keep` is set."""
        if x.dtype != torch.float32:
            return x
        if id(x) in self.kept:
            return self.kept[id(x)]
        copy = x.to(torch.bfloat16)
        weight = x if x._base is None else x._base  # the weights of one expert are a view
        if isinstance(weight, nn.Parameter):
            self.copied += copy.nbytes
            if self.keep and weight is x:
                self.kept[id(x)] = copy
        return copy


def widen(x: Tensor) -> Tensor:
    """Return `x` in float32 where it is bfloat16."""
    return x.float() if x.dtype == torch.bfloat16 else x


def fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor | None = None,
    dropout: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Return `scaled_dot_product_attention` of q [B N L H], k [B N S H] and v [B N S V], by a fused kernel."""
    bias = None if seen is None else torch.zeros_like(seen, dtype=q.dtype).expand(*q.shape[:3], k.shape[2])
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    return kernel(q, k, v, bias, torch.is_grad_enabled(), dropout, is_causal, scale=scale)[0]
