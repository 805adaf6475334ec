"""The one decoder. GPT-2 and Llama are values of `ModelConfig`, not classes; each layer may have its own mechanism."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from . import attention
from .cache import Cache
from .config import ModelConfig
from .documents import PLAIN, Documents
from .errors import UserError
from .feed_forward import Experts, FeedForward
from .layers import Dropout, Linear, make_norm
from .spec import CAUSAL, AttentionConfig, Mask


def attention_configs(config: ModelConfig) -> list[AttentionConfig]:
    """One `Config` per layer. Raises `UserError` for an unknown mechanism or option, or one that does not fit."""
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
        own = {**shared, **config.options.get(name, {}), **config.options.get(f"{name}@{i}", {})}
        return attention.config(name, **own)

    known = [layer(i, name) for i, name in enumerate(config.layers)]
    for each in known:
        each.check_context(config.context)
    return known


def flops_per_token(config: ModelConfig, context: int | None = None, new: int | None = None) -> float:
    """Matrix-product FLOPs of a forward pass at full context, per token; training takes about three times that. `new`:
    of so many tokens at a time, the last of the context; None: of all of them at once."""
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
    def __init__(self, config: ModelConfig, mixer: AttentionConfig, mechanism: str, experts: bool = False) -> None:
        super().__init__()
        self.attention_norm, self.ff_norm = make_norm(config), make_norm(config)
        self.attention = attention.module(mechanism).Attention(mixer)
        self.ff = Experts(config) if experts else FeedForward(config, config.resolved_ff_dim)
        self.drop = Dropout(config.dropout)

    def forward(
        self, x: Tensor, positions: Tensor, cache: Cache | None, mask: Mask, documents: Documents | None = None
    ) -> tuple[Tensor, Cache | None]:
        y = self.attention_norm(x)
        if documents is None:
            y, cache = self.attention(y, positions, cache, mask)
        else:
            y = documents.attend(self.attention, y)
        x = x + self.drop(y)
        return x + self.drop(self.ff(self.ff_norm(x))), cache


class Decoder(nn.Module):
    """Token ids B L -> logits B L V, and the caches of all layers where they were given."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = c = config
        self.embed = nn.Embedding(c.vocab_size, c.d_model)
        self.place: nn.Embedding | None = nn.Embedding(c.context, c.d_model) if c.positions == "learned" else None
        self.drop = Dropout(c.dropout)
        mixers = attention_configs(c)
        layers = zip(mixers, c.layers, map(c.has_experts, range(c.n_layers)), strict=True)
        self.layers = nn.ModuleList(Block(c, mixer, name, experts) for mixer, name, experts in layers)
        self.recompute = False  # in training, layers keep their inputs alone and are computed again going back
        self.norm = make_norm(c)
        self.head = Linear(c.d_model, c.vocab_size, bias=False)
        self.init_weights()
        if c.tied:
            self.head.weight = self.embed.weight

    def init_weights(self) -> None:
        """GPT-2's: normal with 0.02, and smaller by sqrt(2 layers) where a branch is added to the residual stream.
        Norms, biases and whatever a mechanism sets up itself (gates, decays) stay as they are."""
        small = 0.02 / math.sqrt(2 * self.config.n_layers)
        for name, module in self.named_modules():
            if isinstance(module, nn.Embedding) or (isinstance(module, nn.Linear) and ".gate." not in name):
                nn.init.normal_(module.weight, std=small if name.endswith((".o", ".out")) else 0.02)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, Experts):
                nn.init.normal_(module.out, std=small)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        cache: list[Cache] | None = None,
        documents: Tensor | None = None,
    ) -> tuple[Tensor, list[Cache] | None]:
        """`positions` (B L, -1: padding) None: the tokens follow on from those in the cache, and none is padding.

        `documents` (B L, -1: padding): which document of its row each token belongs to, where rows hold several, whole;
        each is then read as if it were alone. The logits of padding mean nothing.
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
        """What the head reads: B L D."""
        mask, packed = CAUSAL, None
        if documents is not None:
            if positions is not None or cache:
                raise UserError("packed documents have positions of their own and no cache: give documents alone")
            packed = Documents.of(documents)
            tokens, positions = packed.packed(tokens), packed.places
            self._check_length(packed.positions.shape[1])
        if positions is None:
            start = cache[0].tokens if cache else 0
            if cache and cache[0].ragged and start:
                raise UserError("this cache holds sequences of different lengths: give the positions of the new tokens")
            self._check_length(start + tokens.shape[1])
            positions = torch.arange(start, start + tokens.shape[1], device=tokens.device).expand(tokens.shape)
            mask = PLAIN if not (cache and cache[0].ragged) else CAUSAL
        x = self.embed(tokens)
        if self.place is not None:
            x = x + self.place(positions[:1] if mask.plain else positions.clamp(min=0))
        x = self.drop(x)
        kept = []
        for i, layer in enumerate(self.layers):
            if self.recompute and torch.is_grad_enabled() and not cache:
                x, after = checkpoint(layer, x, positions, None, mask, packed, use_reentrant=False)
            else:
                x, after = layer(x, positions, cache[i] if cache else None, mask, packed)
            kept.append(after)
        x = self.norm(x)
        return packed.unpacked(x) if packed else x, kept if cache else None

    def experts(self) -> list[Experts]:
        return [block.ff for block in self.blocks() if isinstance(block.ff, Experts)]

    def blocks(self) -> list[Block]:
        return [layer for layer in self.layers if isinstance(layer, Block)]

    def _check_length(self, length: int) -> None:
        if self.place is not None and length > self.config.context:
            raise UserError(
                f"{length} tokens are longer than the {self.config.context} learned positions of this model: "
                "shorten the prompt or ask for fewer tokens, or train with rotary positions"
            )

    def loss(self, tokens: Tensor, targets: Tensor, documents: Tensor | None = None) -> Tensor:
        """Mean cross entropy in nats per token, targets B L; a target of -1 does not count."""
        logits, _ = self(tokens, documents=documents)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1)

    def empty_cache(
        self,
        batch: int,
        max_len: int,
        *,
        ragged: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> list[Cache]:
        """One cache per layer for `batch` sequences of up to `max_len` tokens; `ragged` where lengths differ."""
        self._check_length(max_len)
        weight = self.embed.weight
        like: dict[str, Any] = {"dtype": dtype or weight.dtype, "device": device or weight.device}
        return [
            Cache.empty(b.attention.config.cache_spec, batch, max_len, ragged=ragged, **like) for b in self.blocks()
        ]

    def parameter_count(self) -> int:
        """Parameters, each counted once, positions and embeddings included."""
        return sum(p.numel() for p in self.parameters())


def parameters(model: ModelConfig) -> int:
    with torch.device("meta"):
        return Decoder(model).parameter_count()


def cache_floats(model: ModelConfig, tokens: int | None = None) -> int:
    """What one sequence of so many tokens (None: the context) leaves in the caches of all layers."""
    return sum(config.cache_spec.floats(tokens or model.context) for config in attention_configs(model))
