"""The cache of one layer: named rows, the position of each row (-1: empty), and named state of fixed size.

A mechanism declares the shape of its cache (`CacheSpec`), and a `Cache` has that shape. A cache is a value: a call
takes one and returns one, and no module keeps any, so prompts can be forked, saved, batched and rewound. Rows are
preallocated and written in place, so use it without gradients, and `fork` before two continuations of one prompt. State
is kept in float32 at least, because what is rounded at every token adds up.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .arguments import check_device, check_tensor
from .device import check_room
from .errors import UserError, quoted
from .files import regular, write_bytes
from .ranges import Count, Size, checked
from .spec import CacheSpec


@dataclass(frozen=True)
class Seen:
    """The stored tokens that the queries of one call may read."""

    positions: Tensor  # B S; -1: no token
    rows: dict[str, Tensor]  # name -> B S ...

    def pick(self, keep: Tensor, count: int) -> Seen:
        """Return the rows that `keep` (B S, bool) marks, at most `count` of them, in order."""
        chosen = keep.to(torch.uint8).topk(count).indices.sort().values
        batch = torch.arange(len(keep), device=keep.device)[:, None]
        positions = torch.where(keep[batch, chosen], self.positions[batch, chosen], -1)
        return Seen(positions, {name: rows[batch, chosen] for name, rows in self.rows.items()})


@dataclass(frozen=True)
class Cache:
    """The cache of one layer for B sequences, as `spec` declares it."""

    spec: CacheSpec
    positions: Tensor  # B S; -1: an empty row
    rows: dict[str, Tensor]  # name -> B S ...
    state: dict[str, Tensor]  # name -> B ...
    beside: dict[str, Cache]  # name -> a further memory
    capacity: int  # rows of one sequence
    tokens: int = 0  # tokens passed, padding counted; a number of the host, so that no step waits for the device
    ragged: bool = True  # False: a promise that all sequences advance together, without padding

    @classmethod
    @checked
    def empty(
        cls,
        spec: CacheSpec,
        batch: Count,
        max_len: Size,
        *,
        ragged: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Cache:
        """Return an empty cache for `batch` sequences of up to `max_len` tokens; `ragged` where lengths may differ.

        A cache of state alone takes any number of tokens, and the same room for all.
        """
        check_device(device)
        _check_memory(spec, batch, max_len, dtype, device)
        capacity = spec.slots(max_len) if spec.rows else 0
        columns = capacity + 1 if ragged else capacity  # padding is written to the last column of a ragged cache
        return cls(
            spec=spec,
            positions=torch.full((batch, columns), -1, device=device),
            rows={n: torch.zeros(batch, columns, *s, dtype=dtype, device=device) for n, s in spec.rows.items()},
            state={n: torch.zeros(batch, *s, dtype=state_dtype(dtype), device=device) for n, s in spec.state.items()},
            beside={
                n: cls.empty(s, batch, max_len, ragged=ragged, dtype=dtype, device=device)
                for n, s in spec.beside.items()
            },
            capacity=capacity,
            ragged=ragged,
        )

    @property
    def held(self) -> int:
        """Return the number of columns that may hold a row."""
        return min(self.capacity, self.spec.slots(self.tokens))

    def with_state(self, **state: Tensor) -> Cache:
        """Return the cache with this state, all of it, by name (B ...)."""
        return replace(self, state={n: s.to(self.state[n].dtype) for n, s in state.items()})

    def each(self, change: Callable[[Tensor], Tensor]) -> Cache:
        """Return the cache with `change` applied to all its tensors (B ...), positions and further memories too."""
        return replace(
            self,
            positions=change(self.positions),
            rows={n: change(t) for n, t in self.rows.items()},
            state={n: change(t) for n, t in self.state.items()},
            beside={n: c.each(change) for n, c in self.beside.items()},
        )

    def fork(self) -> Cache:
        """Return a copy that shares no memory with it."""
        return self.each(torch.clone)

    def widened(self, max_len: int, *, ragged: bool) -> Cache:
        """Return a copy with room for `max_len` tokens, not fewer than before; `ragged` where lengths may differ."""
        sample = next(iter((*self.rows.values(), *self.state.values())), None)
        like: dict[str, Any] = {"dtype": None if sample is None else sample.dtype, "device": self.positions.device}
        wide = Cache.empty(self.spec, len(self.positions), max_len, ragged=ragged, **like)
        assert wide.capacity >= self.capacity
        wide.positions[:, : self.capacity] = self.positions[:, : self.capacity]
        for name, old in self.rows.items():
            wide.rows[name][:, : self.capacity] = old[:, : self.capacity]
        beside = {n: c.widened(max_len, ragged=ragged) for n, c in self.beside.items()}
        return replace(wide, state={n: t.clone() for n, t in self.state.items()}, beside=beside, tokens=self.tokens)

    def rewind(self, length: int) -> Cache:
        """Return the cache as it was after `length` tokens, in place. `UserError` where it cannot go back that far."""
        if self.spec.state or self.spec.keep is not None:
            kind = "keeps a running state" if self.spec.state else f"remembers only the last {self.spec.keep} tokens"
            raise UserError(f"this cache cannot go back to {length} tokens, because it {kind}; fork it before instead")
        if not 0 <= length <= self.tokens:
            raise UserError(
                f"cannot rewind to {length} tokens: the cache has seen {self.tokens}; give 0 to {self.tokens}"
            )
        self.positions[:, self.spec.slots(length) :] = -1
        beside = {n: c.rewind(length) for n, c in self.beside.items()}
        return replace(self, tokens=length, beside=beside)

    def floats(self) -> int:
        """Return the floats of all tokens held, over the batch. They are counted; `spec.floats` foretells them."""
        live = int((self.positions[:, : self.capacity] >= 0).sum())
        rows = live * sum(t.shape[2:].numel() for t in self.rows.values())
        state = sum(t.numel() for t in self.state.values())
        return rows + state + sum(c.floats() for c in self.beside.values())

    def nbytes(self) -> int:
        """Return `floats` in bytes."""
        live = int((self.positions[:, : self.capacity] >= 0).sum())
        rows = live * sum(t.shape[2:].numel() * t.element_size() for t in self.rows.values())
        state = sum(t.numel() * t.element_size() for t in self.state.values())
        return rows + state + sum(c.nbytes() for c in self.beside.values())

    def allocated_bytes(self) -> int:
        """Return the bytes of all buffers, filled or not, positions left out."""
        own = sum(t.numel() * t.element_size() for t in (*self.rows.values(), *self.state.values()))
        return own + sum(c.allocated_bytes() for c in self.beside.values())

    def _tensors(self, prefix: str = "") -> dict[str, Tensor]:
        out = {f"{prefix}positions": self.positions, **{f"{prefix}row.{n}": t for n, t in self.rows.items()}}
        out |= {f"{prefix}state.{n}": t for n, t in self.state.items()}
        for name, cache in self.beside.items():
            out |= cache._tensors(f"{prefix}{name}/")
        return out


def state_dtype(dtype: torch.dtype | None) -> torch.dtype:
    """Return the dtype of state in a cache of `dtype` (None: the default): float32 at least."""
    return torch.promote_types(torch.get_default_dtype() if dtype is None else dtype, torch.float32)


Output = tuple[Tensor, Cache | None]  # of a mechanism's forward: y (B L D), and the cache where one was given


def extend(
    cache: Cache | None, positions: Tensor, tokens: int | None = None, /, **new: Tensor
) -> tuple[Seen, Cache | None]:
    """Return the rows that this call may read, and the cache with rows `new` (name -> B L ...) at `positions` (B L).

    `tokens` is the number of tokens passed; None: the number of rows (it differs where a row is a completed chunk).
    Without a cache, as in training, a call reads its own rows, and nothing is kept. Raises `UserError` where the cache
    is full.
    """
    check_tensor("positions", positions, "B L", whole=True)
    if tokens is not None and (isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 0):
        raise UserError(f"tokens is {quoted(tokens)}: give how many were passed, or None for as many as there are rows")
    if cache is not None and (not isinstance(cache, Cache) or set(new) != set(cache.rows)):
        named = sorted(cache.rows) if isinstance(cache, Cache) else "Cache.empty"
        raise UserError(f"cache is {_shape(cache)} and the rows {sorted(new)}: give a Cache and all its rows, {named}")
    for name, value in new.items():
        if not isinstance(value, Tensor) or value.ndim < 2 or value.shape[:2] != positions.shape:
            place = _shape(positions)
            raise UserError(f"the rows {name} are {_shape(value)}: give a tensor B L ... for positions {place}")
    if (cache is None or cache.ragged) and positions.stride(0):  # one row expanded has no padding
        pad = positions < 0  # the values of a pad, which may be NaN, must not reach a sum
        new = {n: t.masked_fill(pad.view(*pad.shape, *[1] * (t.ndim - 2)), 0) for n, t in new.items()}
    if cache is None:
        return Seen(positions, new), None
    passed = positions.shape[1] if tokens is None else tokens
    after = replace(cache, tokens=cache.tokens + passed)
    if not cache.rows:  # state alone, of which any number of tokens makes no more
        return Seen(positions[:, :0], {}), after
    if cache.capacity == cache.spec.keep and after.tokens > cache.capacity:
        return _extend_ring(cache, after, positions, new)
    _check_room(cache, after, positions)
    _write(cache, cache.held, positions, positions, new)
    return _read(after), after


def _check_memory(
    spec: CacheSpec, batch: int, max_len: int, dtype: torch.dtype | None, device: torch.device | str | None
) -> None:
    """Raise `UserError` for a cache that is larger than the memory it would lie in; nothing is allocated."""
    place = torch.get_default_device() if device is None else torch.device(device)
    if place.type in ("cpu", "cuda"):
        width = (torch.get_default_dtype() if dtype is None else dtype).itemsize
        needed = batch * spec.nbytes(max_len, width)
        what = f"a cache of {batch:,} sequences of {max_len:,} tokens"
        check_room(what, needed, "ask for fewer or shorter ones", place)


def _read(cache: Cache) -> Seen:
    held = cache.held
    return Seen(cache.positions[:, :held], {n: t[:, :held] for n, t in cache.rows.items()})


def _extend_ring(cache: Cache, after: Cache, positions: Tensor, new: dict[str, Tensor]) -> tuple[Seen, Cache]:
    """Extend a full ring.

    One new token overwrites the row that it can no longer see, so its row is written before all are read. A longer
    chunk may overwrite rows that its first queries still need, so old and new rows are read before any is written.
    """
    if positions.shape[1] == 1:
        _write(cache, cache.tokens % cache.capacity, positions, positions % cache.capacity, new)
        return _read(after), after
    old = _read(cache)
    both = {n: torch.cat([old.rows[n], new[n].to(old.rows[n].dtype)], 1) for n in new}
    seen = Seen(torch.cat([old.positions, positions], 1), both)
    newest = positions.max(1, keepdim=True).values
    kept = torch.where(positions > newest - cache.capacity, positions, -1)
    _scatter(cache, kept, kept % cache.capacity, new)
    return seen, after


def _check_room(cache: Cache, after: Cache, positions: Tensor) -> None:
    needed = cache.spec.slots(after.tokens)
    if needed > cache.capacity and cache.ragged:  # padding takes no room, but only the device knows how much there is
        needed = int(positions.max()) + 1
    if needed > cache.capacity:
        raise UserError(
            f"the cache has room for {cache.capacity * cache.spec.every} tokens and {needed * cache.spec.every} "
            "are needed: make it with a larger max_len"
        )


def _write(cache: Cache, column: int, positions: Tensor, slots: Tensor, new: dict[str, Tensor]) -> None:
    """Write into columns from `column` on where all sequences advance together, else each row into its own slot."""
    if cache.ragged:
        return _scatter(cache, positions, slots, new)
    columns = slice(column, column + positions.shape[1])
    cache.positions[:, columns] = positions
    for name, values in new.items():
        cache.rows[name][:, columns] = values


def _scatter(cache: Cache, positions: Tensor, slots: Tensor, new: dict[str, Tensor]) -> None:
    if cache.ragged:
        slots = torch.where(positions >= 0, slots, cache.capacity)
    else:  # a ring, all sequences alike: the rows at the front would be overwritten in this call
        slots = slots[:, -cache.capacity :]
        positions = positions[:, -cache.capacity :]
        new = {n: t[:, -cache.capacity :] for n, t in new.items()}
    batch = torch.arange(len(slots), device=slots.device)[:, None]
    for name, values in new.items():
        cache.rows[name][batch, slots] = values.to(cache.rows[name].dtype)
    cache.positions[batch, slots] = positions
    if cache.ragged:
        cache.positions[:, cache.capacity] = -1


@checked
def save_cache(caches: Sequence[Cache], path: str | Path) -> Path:
    """Write the caches of all layers to one safetensors file, whole or not at all. Return its path."""
    from safetensors.torch import save as pack

    tensors: dict[str, Tensor] = {}
    layers = []
    for i, cache in enumerate(caches):
        tensors |= {f"{i}/{name}": t.contiguous() for name, t in cache._tensors().items()}
        layers.append(_describe(cache))
    return write_bytes(path, pack(tensors, {"attnlab.cache": json.dumps(layers)}))


@checked
def load_cache(path: str | Path, device: torch.device | str = "cpu") -> list[Cache]:
    """Return the caches that `save_cache` wrote. Raise `UserError` for a missing, damaged or foreign file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(regular(path)), "pt", device=str(device)) as file:
            layers = json.loads((file.metadata() or {})["attnlab.cache"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except FileNotFoundError:
        raise UserError(f"there is no cache file {path}: save one with attnlab.cache.save") from None
    except (SafetensorError, KeyError, json.JSONDecodeError):
        raise UserError(f"{path} is not a whole cache file: write it again with attnlab.cache.save") from None
    return [_restore(layer, tensors, f"{i}/") for i, layer in enumerate(layers)]


def _describe(cache: Cache) -> dict[str, Any]:
    beside = {n: _describe(c) for n, c in cache.beside.items()}
    spec = {k: v for k, v in asdict(cache.spec).items() if k != "beside"}
    return {"spec": spec, "capacity": cache.capacity, "tokens": cache.tokens, "ragged": cache.ragged, "beside": beside}


def _restore(layer: Mapping[str, Any], tensors: Mapping[str, Tensor], prefix: str) -> Cache:
    beside = {n: _restore(c, tensors, f"{prefix}{n}/") for n, c in layer["beside"].items()}
    shapes = {part: {n: tuple(s) for n, s in layer["spec"][part].items()} for part in ("rows", "state")}
    state = {n: tensors[f"{prefix}state.{n}"] for n in layer["spec"]["state"]}
    spec = CacheSpec(**{**layer["spec"], **shapes, "beside": {n: c.spec for n, c in beside.items()}})
    return Cache(
        spec=spec,
        positions=tensors[f"{prefix}positions"],
        rows={n: tensors[f"{prefix}row.{n}"] for n in spec.rows},
        state={n: t.to(state_dtype(t.dtype)) for n, t in state.items()},
        beside=beside,
        capacity=layer["capacity"],
        tokens=layer["tokens"],
        ragged=layer["ragged"],
    )


def _shape(value: Any) -> str:
    if isinstance(value, Cache):
        return "a Cache"
    return str(tuple(value.shape)) if isinstance(value, Tensor) else quoted(value)
