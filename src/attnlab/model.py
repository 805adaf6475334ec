"""The decoder. GPT-2 and Llama are values of `ModelConfig`, not classes; each layer may have its own mechanism."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from . import attention
from .arguments import check_tensor
from .cache import Cache
from .config import ModelConfig
from .device import check_room
from .documents import PLAIN, PackedRows
from .errors import UserError, quoted
from .feed_forward import Experts, FeedForward
from .layers import Dropout, Linear, default_weights, make_norm
from .ranges import Count, Positive, Size, Total, check_value, checked
from .spec import CAUSAL, AttentionConfig, Mask

FLOAT = 4  # bytes


@checked
def attention_configs(config: ModelConfig) -> list[AttentionConfig]:
    """Return one `Config` per layer. Raise `UserError` for an unknown mechanism or option, or one that does not fit."""
    shared = {
        "d_model": config.d_model,
        "n_heads": config.n_heads,
        "head_dim": config.head_dim or config.d_model // config.n_heads,
        "rope_theta": config.rope_theta if config.positions == "rope" else None,
        "rope_scaling": config.rope_scaling,
        "bias": config.bias,
        "dropout": config.dropout,
        "impl": config.impl,
    }

    def layer(i: int, name: str) -> AttentionConfig:
        options = {**shared, **config.options.get(name, {}), **config.options.get(f"{name}@{i}", {})}
        return attention.config(name, **options)

    configs: list[AttentionConfig] = []
    for i, name in enumerate(config.layers):
        placed = layer(i, name).placed(configs, config.n_layers)
        placed.check_context(config.context)
        _check_taken(f"layer {i} ({name})", placed, configs)
        configs.append(placed)
    return configs


def _check_taken(layer: str, config: AttentionConfig, before: list[AttentionConfig]) -> None:
    """Raise `UserError` where no earlier layer gives what a layer takes, or the last that does gives another shape."""
    for name, shape in config.takes.items():
        given = next((each.gives[name] for each in reversed(before) if name in each.gives), None)
        if given is None:
            raise UserError(
                f"{layer} takes {name} of an earlier layer, and none gives it: put it after one that does, or let it "
                "make its own"
            )
        if tuple(given) != tuple(shape):
            raise UserError(
                f"{layer} takes {name} of shape {tuple(shape)}, and the last layer that gives it gives {tuple(given)}: "
                "give both the same heads and head_dim"
            )


@checked
def flops_per_token(config: ModelConfig, context: Count | None = None, new: Count | None = None) -> float:
    """Return the FLOPs of the matrix products of a forward pass, per token; training takes about three times as many.

    `context` is in tokens; None: the model's. `new` is how many tokens, the last of the context, one pass reads; None:
    all of them.
    """
    context = context or config.context
    new = new or context
    matrices = 3 if config.ff_kind == "swiglu" else 2
    dense = 2 * matrices * config.d_model * config.resolved_ff_dim
    used = config.experts_per_token + config.experts.shared
    experts = 2 * config.d_model * (matrices * config.resolved_expert_dim * used + config.n_experts)
    ff = sum(experts if config.has_experts(i) else dense for i in range(config.n_layers))
    attending = sum(c.flops(new, context) / new for c in attention_configs(config))
    return attending + ff + 2 * config.d_model * config.vocab_size


class Block(nn.Module):
    """One layer: attention and a feed-forward, each behind a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, mixer: AttentionConfig, mechanism: str, experts: bool = False) -> None:
        super().__init__()
        self.attention_norm = make_norm(config)
        self.ff_norm = make_norm(config)
        self.attention = attention.layer(mechanism, mixer)
        self.ff = Experts(config) if experts else FeedForward(config, config.resolved_ff_dim)
        self.drop = Dropout(config.dropout)

    def forward(
        self, x: Tensor, positions: Tensor, cache: Cache | None, mask: Mask, documents: PackedRows | None = None
    ) -> tuple[Tensor, Cache | None]:
        """x: B L D at positions B L -> B L D, and the cache where one was given; 1 R D where `documents` are given."""
        y = self.attention_norm(x)
        if documents is None:
            y, cache = self.attention(y, positions, cache, mask)
        else:
            y = documents.attend(self.attention, y, mask)
        x = x + self.drop(y)
        return x + self.drop(self.ff(self.ff_norm(x))), cache


class Decoder(nn.Module):
    """Token ids B L -> logits B L V, and the caches of all layers where they were given."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        check_value("config", config, ModelConfig)
        self.config = config
        mixers = attention_configs(config)
        check_size(config, mixers)
        D = config.d_model
        with default_weights() as untouched:
            self.embed = nn.Embedding(config.vocab_size, D)
            self.place: nn.Embedding | None = nn.Embedding(config.context, D) if config.positions == "learned" else None
            self.drop = Dropout(config.dropout)
            layers = zip(mixers, config.layers, strict=True)
            self.layers = nn.ModuleList(
                Block(config, mixer, name, config.has_experts(i)) for i, (mixer, name) in enumerate(layers)
            )
            self.shares = any(mixer.gives or mixer.takes for mixer in mixers)  # whether layers give rows to later ones
            self.recompute = False  # True: training keeps only the inputs of layers, and computes the rest again
            self.norm = make_norm(config)
            self.head = Linear(D, config.vocab_size, bias=False)
        init_weights(self, config.n_layers, untouched)
        if config.tied:
            self.head.weight = self.embed.weight

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        cache: list[Cache] | None = None,
        documents: Tensor | None = None,
    ) -> tuple[Tensor, list[Cache] | None]:
        """Return the logits (B L vocab_size) of tokens (B L), and the caches after them where caches were given.

        `positions`: B L, -1 for padding; None: the tokens follow those in the cache, and none is padding. `documents`:
        B L, the number of each token's document in its row, -1 for padding, where rows hold several whole documents;
        each is then read as if it were alone. The logits of padding mean nothing. `UserError` where these do not fit.
        """
        x, caches = self.hidden(tokens, positions, cache, documents)
        return self.head(x), caches

    def hidden(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        cache: list[Cache] | None = None,
        documents: Tensor | None = None,
    ) -> tuple[Tensor, list[Cache] | None]:
        """Return the input of the head (B L D), and the caches. The arguments are those of `forward`."""
        self._check_inputs(tokens, positions, cache, documents)
        mask = CAUSAL
        packed = None
        if documents is not None:
            packed = PackedRows.of(documents)
            tokens = packed.packed(tokens)
            positions = packed.places
            self._check_length(packed.positions.shape[1])
        if positions is None:
            start = cache[0].tokens if cache is not None else 0
            if cache is not None and cache[0].ragged and start:
                raise UserError("this cache holds sequences of different lengths: give the positions of the new tokens")
            self._check_length(start + tokens.shape[1])
            positions = torch.arange(start, start + tokens.shape[1], device=tokens.device).expand(tokens.shape)
            mask = PLAIN if cache is None or not cache[0].ragged else CAUSAL
        try:
            x = self.embed(tokens)
        except IndexError:
            last = self.config.vocab_size - 1
            raise UserError(f"tokens has ids outside 0 to {last}, which the model lacks") from None
        if self.place is not None:
            x = x + self.place(positions[:1] if mask.plain else positions.clamp(min=0))
        x = self.drop(x)
        kept = []
        for i, layer in enumerate(self.layers):
            mask = mask.handed() if self.shares else mask
            if self.recompute and torch.is_grad_enabled() and cache is None:
                x, after = checkpoint(layer, x, positions, None, mask, packed, use_reentrant=False)
            else:
                x, after = layer(x, positions, None if cache is None else cache[i], mask, packed)
            kept.append(after)
        x = self.norm(x)
        return packed.unpacked(x) if packed else x, None if cache is None else kept

    def experts(self) -> list[Experts]:
        """Return the experts of all layers that have them."""
        return [block.ff for block in self.blocks() if isinstance(block.ff, Experts)]

    def blocks(self) -> list[Block]:
        """Return all layers, with their type."""
        return [layer for layer in self.layers if isinstance(layer, Block)]

    def _check_inputs(self, tokens: Any, positions: Any, cache: Any, documents: Any) -> None:
        """Raise `UserError` for arguments of `forward` of another kind than it takes, or that do not go together."""
        for name, value in (("tokens", tokens), ("positions", positions), ("documents", documents)):
            if value is not None or name == "tokens":
                check_tensor(name, value, "B L", whole=True)
        for name, value in (("positions", positions), ("documents", documents)):
            rows = (len(tokens),) if name == "documents" else (1, len(tokens))
            if value is not None and (len(value) not in rows or value.shape[1] != tokens.shape[1]):
                raise UserError(f"{name} has the shape {tuple(value.shape)}: give {tuple(tokens.shape)}, as of tokens")
        if cache is not None and not (
            isinstance(cache, list | tuple) and all(isinstance(each, Cache) for each in cache)
        ):
            raise UserError(f"cache is {quoted(cache)}: give a Cache for each of {len(self.layers)} layers, or None")
        if cache is not None and len(cache) != len(self.layers):
            raise UserError(f"cache has {len(cache)} layers: give a Cache for each of {len(self.layers)}")
        if documents is not None and (positions is not None or cache is not None):
            raise UserError("packed documents have positions of their own and no cache: give documents alone")

    def _check_length(self, length: int) -> None:
        if self.place is not None and length > self.config.context:
            raise UserError(
                f"{length} tokens are longer than the {self.config.context} learned positions of this model: "
                "shorten the prompt or ask for fewer tokens, or train with rotary positions"
            )

    def loss(self, tokens: Tensor, targets: Tensor, documents: Tensor | None = None) -> Tensor:
        """Return the mean cross entropy in nats per token. `targets`: B L; -1: it does not count."""
        check_tensor("targets", targets, "B L", whole=True)
        check_tensor("tokens", tokens, "B L", whole=True)
        if targets.shape != tokens.shape:
            raise UserError(f"targets has the shape {tuple(targets.shape)}: give {tuple(tokens.shape)}, as of tokens")
        logits, _ = self(tokens, documents=documents)
        try:
            return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1)
        except IndexError:
            last = self.config.vocab_size - 1
            raise UserError(f"targets has ids outside 0 to {last}, which the model lacks; -1 does not count") from None

    @checked
    def empty_cache(
        self,
        batch: Count,
        max_len: Size,
        *,
        ragged: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> list[Cache]:
        """Return one empty cache per layer, for `batch` sequences of up to `max_len` tokens.

        `ragged` where lengths differ. Raises `UserError` where there are fewer learned positions.
        """
        self._check_length(max_len)
        weight = self.embed.weight
        like: dict[str, Any] = {"dtype": dtype or weight.dtype, "device": device or weight.device}
        return [
            Cache.empty(b.attention.config.cache_spec, batch, max_len, ragged=ragged, **like) for b in self.blocks()
        ]

    def parameter_count(self) -> int:
        """Return the number of parameters, each counted once, positions and embeddings included."""
        return sum(p.numel() for p in self.parameters())


def check_size(config: ModelConfig, mixers: list[AttentionConfig]) -> None:
    """Raise `UserError` where a model is larger than the memory of this machine, or than any; nothing is allocated.

    `mixers`: the Config of each layer's attention. On the meta device, where tensors have no values, any size goes that
    PyTorch can count.
    """
    wants = torch.get_default_device().type != "meta"
    advice = "make it smaller (model.n_layers, model.d_model, model.vocab_size, model.context and the widths of layers)"
    tables = config.vocab_size * (1 if config.tied else 2) + (config.context if config.positions == "learned" else 0)
    try:
        with torch.device("meta"):
            kinds: list[tuple[tuple[Any, ...], int]] = []  # layers that are alike, and their parameters
            total = tables * config.d_model
            for i, (name, mixer) in enumerate(zip(config.layers, mixers, strict=True)):
                kind = (name, mixer, config.has_experts(i))
                found = next((count for known, count in kinds if known == kind), None)
                if found is None:
                    found = sum(p.numel() for p in Block(config, mixer, name, config.has_experts(i)).parameters())
                    kinds.append((kind, found))
                total += found
    except (RuntimeError, OverflowError, TypeError, MemoryError):
        raise UserError(f"a model of this size is more than PyTorch can count: {advice}") from None
    if wants:
        check_room(f"a model of {total:,} parameters", FLOAT * total, advice)


@checked
def init_weights(
    model: nn.Module, layers: Count, untouched: Callable[[Tensor | None], bool], std: Positive = 0.02
) -> None:
    """Set the weights of a decoder with so many layers, or of a mechanism in one, as GPT-2's: normal with `std`.

    Where a branch is added to the residual stream, `std` is smaller by sqrt(2 layers). What a mechanism has set itself,
    and what is neither a linear layer nor an embedding, stays as it is: only weights that are `untouched` are set.
    """
    small = std / math.sqrt(2 * layers)
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.Linear) and untouched(module.weight):
            nn.init.normal_(module.weight, std=small if name.split(".")[-1] in ("o", "out") else std)
        if isinstance(module, nn.Linear) and module.bias is not None and untouched(module.bias):
            nn.init.zeros_(module.bias)
        if isinstance(module, Experts):
            nn.init.normal_(module.out, std=small)


@checked
def parameters(model: ModelConfig) -> int:
    """Return the number of parameters of a model, which is not allocated."""
    with torch.device("meta"):
        return Decoder(model).parameter_count()


@checked
def cache_floats(model: ModelConfig, tokens: Total | None = None) -> int:
    """Return the floats that one sequence of so many tokens (None: the context) leaves in the caches of all layers."""
    return sum(config.cache_spec.floats(tokens or model.context) for config in attention_configs(model))


def cache_nbytes(model: ModelConfig, width: int, tokens: int | None = None) -> int:
    """Return these floats in bytes, where a number of a row takes `width` bytes."""
    return sum(config.cache_spec.nbytes(tokens or model.context, width) for config in attention_configs(model))
