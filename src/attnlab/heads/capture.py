"""Record of a forward pass: the attention and the output of every head of every layer, for any mechanism."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import UserError
from ..model import Block, Decoder
from ..recording import Attended, Maps, record_attention, record_notes, shared
from ..spec import AttentionConfig, Mask


@dataclass(frozen=True)
class Layer:
    """One layer's part of a forward pass over B sequences of L tokens."""

    config: AttentionConfig
    maps: tuple[Tensor, ...]  # attention weights, one tensor per call of `attend`, B N L S
    calls: tuple[Attended, ...]  # the companions of each
    gate: Tensor | None  # weights of the memories, B L M; None: there is one memory
    wrote: Tensor  # outputs of the heads, before the output matrix, B L N V
    residual: Tensor  # the residual stream that the layer read, B L D
    latent: Tensor | None  # B L R; None: the mechanism has none
    load: Tensor | None  # tokens that each expert got, E; None: the mechanism has no experts

    def pattern(self) -> Tensor:
        """Return the share of its attention that each query gives to each token, B N L L: rows sum to 1, or to
        what a sink leaves.

        Several calls are added up by their shares. The weight of a key that stands for a group of tokens is divided
        among them equally. Weights of either sign (`signed`) add up to any number. Raises `UserError` where no map is
        recorded, and where the tokens came after others in a cache.
        """
        if not self.maps:
            raise UserError(
                "this mechanism has no attention maps: it computes no softmax over tokens, and records no other weights"
            )
        length = self.wrote.shape[1]
        total = torch.zeros_like(self.maps[0][..., :1]).expand(-1, -1, -1, length).clone()
        for weights, call in zip(self.maps, self.calls, strict=True):
            keys = call.k_pos
            total += shared(_over_tokens(weights, keys, self._group(keys, length), length), call)
        return total.repeat_interleave(self.wrote.shape[2] // total.shape[1], 1)  # heads that share a map are equal

    def shares(self) -> Tensor:
        """Return `pattern` where it is of shares; else divided by the sum of the sizes in each row, B N L L."""
        pattern = self.pattern()
        if not self.config.signed:
            return pattern
        return pattern / pattern.abs().sum(-1, keepdim=True).clamp(min=torch.finfo(pattern.dtype).tiny)

    def _group(self, keys: Tensor, length: int) -> int:
        """Return the number of tokens that a key stands for."""
        beside = list(self.config.cache_spec.beside.values())
        return beside[0].every if beside and keys.shape[1] != length else 1


def _over_tokens(weights: Tensor, keys: Tensor, group: int, length: int) -> Tensor:
    """Return weights on keys (B N L S) as weights on tokens (B N L T); a key at position -1 does not exist."""
    if bool(((keys >= 0) & ((keys + 1) * group > length)).any()):
        raise UserError(
            f"a pattern is that of whole sequences, and these {length} tokens came after others in a cache: leave the "
            "cache out, or read the maps of record_attention"
        )
    tokens = keys[..., None] * group + torch.arange(group, device=keys.device)  # B S group
    tokens = torch.where(keys[..., None] >= 0, tokens, length).flatten(1)
    spread = weights.repeat_interleave(group, -1) / group
    out = weights.new_zeros(*weights.shape[:3], length + 1)
    return out.scatter_add_(-1, tokens[:, None, None].expand_as(spread), spread)[..., :length]


class _Recorder:
    """Hooks of one block: they keep what its attention reads and writes, and add a `Layer` to `seen` at the end."""

    def __init__(self, maps: Maps, notes: dict[str, list[Tensor]], seen: list[Layer]) -> None:
        self.maps = maps
        self.notes = notes
        self.seen = seen

    def register(self, block: Block) -> Iterator[RemovableHandle]:
        """Register the hooks, and yield the handle of each."""
        matrix = output_matrix(block.attention)
        yield block.register_forward_pre_hook(self._enter)
        yield matrix.register_forward_pre_hook(self._write)
        yield block.register_forward_hook(self._leave)

    def _enter(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.residual = inputs[0].detach()

    def _write(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.wrote = inputs[0].detach()

    def _leave(self, module: Block, *_: object) -> None:
        config: AttentionConfig = module.attention.config
        noted = {name: values[0] for name, values in self.notes.items()}
        self.seen.append(
            Layer(
                config=config,
                maps=tuple(self.maps),
                calls=tuple(self.maps.calls),
                gate=noted.get("gate"),
                wrote=self.wrote.unflatten(-1, (config.n_heads, -1)),
                residual=self.residual,
                latent=noted.get("latent"),
                load=noted.get("load"),
            )
        )
        self.maps.clear()
        self.notes.clear()


@contextmanager
def watch(model: Decoder) -> Iterator[list[Layer]]:
    """Yield a list to which every forward pass of `model` adds one `Layer` per block, while it is open."""
    seen: list[Layer] = []
    handles: list[RemovableHandle] = []
    with record_attention() as maps, record_notes() as notes:
        try:
            for block in model.blocks():
                handles.extend(_Recorder(maps, notes, seen).register(block))
            yield seen
        finally:
            for handle in handles:
                handle.remove()


def output_matrix(attention: nn.Module) -> nn.Linear:
    """Return the output matrix of a mechanism, of which each head has its own columns.

    Raises `UserError` where there is none named `o`.
    """
    matrix = getattr(attention, "o", None)
    if not isinstance(matrix, nn.Linear):
        raise UserError(
            f"{type(attention).__module__}.{type(attention).__name__} has no output matrix 'o', so its heads cannot be "
            "told apart: name the nn.Linear that reads the heads' answers self.o"
        )
    return matrix


@contextmanager
def heads_replaced(model: Decoder, layer: int, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace the outputs of the heads of `layer` (B L N V) by `change` of them, while it is open."""
    attention = model.blocks()[layer].attention
    n_heads: int = attention.config.n_heads

    def swap(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (change(inputs[0].unflatten(-1, (n_heads, -1))).flatten(-2),)

    handle = output_matrix(attention).register_forward_pre_hook(swap)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def value_sizes(model: Decoder, layers: list[Layer]) -> list[Tensor | None]:
    """Return, per layer, how much each head adds to the residual stream when it attends to one token alone: B N L.

    It is the length of that token's value behind the output matrix. Attention weights times these are a value-weighted
    pattern. Each query is made to see itself alone; None for a mechanism that reads more than what it may see.
    """
    found: list[Tensor | None] = []
    mask = Mask(window=1)
    for block, layer in zip(model.blocks(), layers, strict=True):
        mask = mask.handed()
        answers: list[Tensor] = []

        def keep(module: nn.Module, inputs: tuple[Tensor, ...], answers: list[Tensor] = answers) -> None:
            answers.append(inputs[0])

        matrix = output_matrix(block.attention)
        handle = matrix.register_forward_pre_hook(keep)
        x = block.attention_norm(layer.residual)
        with record_attention() as maps:
            block.attention(x, torch.arange(x.shape[1], device=x.device).expand(x.shape[:2]), None, mask)
        handle.remove()
        own = torch.eye(x.shape[1], device=x.device)
        if len(maps) != 1 or maps[0].shape[-1] != x.shape[1] or bool(((maps[0] - own).abs() > 1e-5).any()):
            found.append(None)
            continue
        heads = layer.config.n_heads
        per_head = matrix.weight.unflatten(1, (heads, -1))
        written = torch.einsum("blnv,dnv->bnld", answers[0].unflatten(-1, (heads, -1)), per_head)
        found.append(written.norm(dim=-1))
    return found
