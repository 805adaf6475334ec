"""Caches of our mechanisms inside the cache object of transformers: one `Memory` per layer.

Positions are stored with the keys. They are counted from the attention mask, and are -1 where it is 0.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from ..cache import Cache
from ..errors import UserError
from ..spec import CAUSAL, AttentionConfig, Mask


class LayerPlace(NamedTuple):
    """Positions of the tokens of one call."""

    positions: Tensor  # B L, from 0; -1: padding
    mask: Mask


class Memory(CacheLayerMixin):
    """Cache of one layer. It grows by half when it is full, so that every token is copied about twice in all."""

    supports_early_init = False

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__()
        self.config = config
        self.cache: Cache | None = None
        self.room = 0  # tokens that fit into the cache

    def ready(self, x: Tensor, place: LayerPlace) -> Cache:
        """Return the cache with room for the tokens of `x` (B L ...), whose dtype and device it has."""
        ragged = self.ragged or not place.mask.plain
        needed = self.get_seq_length() + x.shape[1]
        if self.cache is None or needed > self.room:
            self.room = needed + needed // 2
        elif ragged == self.cache.ragged:
            return self.cache
        if self.cache is not None:
            return self.cache.widened(self.room, ragged=ragged)
        return Cache.empty(self.config.cache_spec, len(x), self.room, ragged=ragged, dtype=x.dtype, device=x.device)

    @property
    def ragged(self) -> bool:
        """Whether rows hold padding, so that their positions differ."""
        return self.cache is not None and self.cache.ragged

    def get_seq_length(self) -> int:
        """Return the number of tokens so far, padding among them."""
        return 0 if self.cache is None else self.cache.tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of keys that `query_length` new tokens see, and the place of the first."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Return the most tokens that the cache may hold."""
        return -1  # no limit

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether the mechanism can forget its last tokens."""
        return self.config.rewinds

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens, given as a negative number. Raises `UserError` where the mechanism cannot."""
        if tokens_to_remove > 0:
            raise UserError(f"crop was given {tokens_to_remove}: give the number of tokens to forget, below 0")
        if self.cache is not None and tokens_to_remove:
            self.cache = self.cache.rewind(self.cache.tokens + tokens_to_remove)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences `indices`, in that order."""
        if self.cache is not None:
            self.cache = self.cache.each(lambda t: t[indices.to(t.device)])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the sequences `beam_idx`, in that order."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence so many times."""
        if self.cache is not None:
            self.cache = self.cache.each(lambda t: t.repeat_interleave(repeats, 0))

    def reset(self) -> None:
        """Forget all tokens."""
        self.cache = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Fail: transformers' own attention calls it, which is not there."""
        raise AssertionError("a mechanism writes its own cache")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Fail: transformers' own attention calls it, which is not there."""
        raise AssertionError("a mechanism writes its own cache")


def add_memories(cache: object, layers: Iterable[tuple[int, AttentionConfig]]) -> list[Memory]:
    """Return the `Memory` of each of these layers in a cache of transformers, and put it there if it is not.

    `layers`: number and Config of each. Raises `UserError` for a cache of another kind, and for one that holds another
    model's tokens.
    """
    if not isinstance(cache, DynamicCache) or cache.offloading:
        raise UserError(
            f"past_key_values is {type(cache).__name__}: attnlab's mechanisms keep their rows in a DynamicCache, "
            "not offloaded; leave cache_implementation out"
        )
    found = []
    for i, config in layers:
        while len(cache.layers) <= i:
            cache.layers.append(DynamicLayer())
        layer = cache.layers[i]
        if not isinstance(layer, Memory) or layer.config != config:
            if cache.get_seq_length(i):
                raise UserError(f"layer {i} of past_key_values was filled by another model: begin with an empty cache")
            layer = Memory(config)
            cache.layers[i] = layer
        found.append(layer)
    return found


def locate(
    tokens: Tensor, memories: list[Memory], attention_mask: Tensor | None, position_ids: Tensor | None
) -> LayerPlace:
    """Return the positions of `tokens` (B L ...), which follow those in `memories`, and the mask.

    attention_mask: B S over all tokens so far, 0 for padding. position_ids (B L) must agree with it. Raises `UserError`
    where they do not, where a mask has another shape, and where it is missing for padded sequences in the cache.
    """
    batch, new = tokens.shape[:2]
    device = tokens.device
    past = memories[0].get_seq_length() if memories else 0
    ragged = any(memory.ragged for memory in memories)
    positions = torch.arange(past, past + new, device=device).expand(batch, -1)
    padded = False
    if attention_mask is not None:
        if attention_mask.shape != (batch, past + new):
            raise UserError(
                f"attention_mask has shape {list(attention_mask.shape)}; give [{batch}, {past + new}], a number for "
                "every token so far, those in the cache included, 0 for padding"
            )
        real = attention_mask.to(device) != 0
        if padded := not bool(real.all()):
            positions = torch.where(real, real.cumsum(1) - 1, -1)[:, past:]
    elif ragged:
        raise UserError("the cache holds padded sequences: give attention_mask with the new tokens")
    if position_ids is not None and bool(((position_ids.to(device) != positions) & (positions >= 0)).any()):
        raise UserError(
            "position_ids do not count the tokens that attention_mask shows, from 0 in each row; leave them out, and "
            "give each document a row of its own"
        )
    return LayerPlace(positions, CAUSAL if padded or ragged else Mask(plain=True))
