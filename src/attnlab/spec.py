"""The terms of a mechanism: Mask, CacheSpec, RopeScaling, AttentionConfig. Pure Python: no framework is imported here.

One legend of shape letters for the package: B batch, L new tokens, S stored tokens, N query heads, K key/value heads,
H head size, V value size, D model size, R rank.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from .errors import UserError, choose, quoted
from .ranges import Count, Positive, Probability, Size, Total, Word, check_fields, checked

NOTHING: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Mask:
    """The rule which query sees which key, by their positions alone, and what layers of one pass give to later ones.

    It is data, so a kernel can read it.
    """

    window: int | None = None  # positions that a query sees, its own the last of them; None: all up to its own
    plain: bool = False  # a promise: every row holds positions 0, 1, 2, ..., and padding only after them
    given: Mapping[str, Any] = field(
        default_factory=dict, compare=False, repr=False
    )  # tensors that earlier layers gave
    gifts: dict[str, Any] | None = field(default=None, compare=False, repr=False)  # of this layer; None: nobody asks

    def __post_init__(self) -> None:
        """Check the fields by plain comparisons, because a mask is made inside a forward pass."""
        number = isinstance(self.window, int) and not isinstance(self.window, bool)
        if self.window is not None and (not number or self.window < 1):
            raise UserError(f"window is {quoted(self.window)}: it must be a whole number, at least 1, or None")
        if not isinstance(self.plain, bool):
            raise UserError(f"plain is {quoted(self.plain)}: it must be true or false")
        if not isinstance(self.given, dict):
            raise UserError(f"given is {quoted(self.given)}: it must be a dict of tensors by name")
        if self.gifts is not None and not isinstance(self.gifts, dict):
            raise UserError(f"gifts is {quoted(self.gifts)}: it must be a dict of tensors by name, or None")

    def __call__(self, q: Any, k: Any) -> Any:
        """Return whether queries at positions `q` see keys at `k`: arrays that broadcast, of NumPy, Torch or JAX."""
        seen = (k >= 0) & (k <= q)
        return seen if self.window is None else seen & (q - k < self.window)

    def give(self, **tensors: Any) -> None:
        """Give tensors (B S ...) to later layers by name: those that the layer's Config lists in `gives`."""
        if self.gifts is not None:
            self.gifts.update(tensors)

    def handed(self) -> Mask:
        """Return the same mask for the next layer, which may take what this one gave, and all before it."""
        return replace(self, given={**self.given, **(self.gifts or {})}, gifts={})


CAUSAL = Mask()
STATE_BYTES = 4  # of a number of a state, at least: what is rounded at every token adds up


@dataclass(frozen=True)
class CacheSpec:
    """The shape of one layer's cache for one sequence."""

    rows: Mapping[str, tuple[Size, ...]]  # name -> shape of the row of one token
    keep: Count | None = None  # rows kept, the newest; None: all
    state: Mapping[str, tuple[Size, ...]] = field(default_factory=dict)  # name -> shape, whatever the number of tokens
    every: Count = 1  # tokens per row: a row is written when a group of so many is complete
    beside: Mapping[str, CacheSpec] = field(default_factory=dict)  # name -> a further memory with its own `every`
    reads: Mapping[str, Size] = field(default_factory=dict)  # name -> most rows that one step reads; not named: all

    def __post_init__(self) -> None:
        check_fields(self)

    @checked
    def floats(self, tokens: Total) -> int:
        """Return the floats in the cache after `tokens` tokens. Benchmarks, report, docs and the size law read this."""
        own = self.slots(tokens) * self._row + sum(math.prod(shape) for shape in self.state.values())
        return own + sum(spec.floats(tokens) for spec in self.beside.values())

    @checked
    def read(self, tokens: Total) -> int:
        """Return how many of these floats one step has to read."""
        unread = {name: max(self.slots(tokens) - most, 0) for name, most in self.reads.items()}
        own = self.floats(tokens) - sum(rows * math.prod(self.rows[name]) for name, rows in unread.items())
        return own - sum(spec.floats(tokens) - spec.read(tokens) for spec in self.beside.values())

    def nbytes(self, tokens: int, width: int) -> int:
        """Return the bytes in the cache after `tokens` tokens, where a number of a row takes `width` bytes."""
        return width * self.floats(tokens) + max(STATE_BYTES - width, 0) * self.state_floats

    def read_nbytes(self, tokens: int, width: int) -> int:
        """Return how many of these bytes one step has to read."""
        return width * self.read(tokens) + max(STATE_BYTES - width, 0) * self.state_floats

    @property
    def state_floats(self) -> int:
        """Return the floats of all state, that of further memories included."""
        own = sum(math.prod(shape) for shape in self.state.values())
        return own + sum(spec.state_floats for spec in self.beside.values())

    @checked
    def slots(self, tokens: Total) -> int:
        """Return the rows in the cache after `tokens` tokens."""
        rows = tokens // self.every
        return rows if self.keep is None else min(rows, self.keep)

    @property
    def per_token(self) -> float:
        """Return the floats that each further token adds in the long run; 0 for a ring or a fixed state."""
        own = 0.0 if self.keep is not None else self._row / self.every
        return own + sum(spec.per_token for spec in self.beside.values())

    @property
    def _row(self) -> int:
        return sum(math.prod(shape) for shape in self.rows.values())


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """The rule by which rotary pairs turn more slowly, for contexts longer than those first trained on.

    linear slows all pairs by `factor`. llama3 and yarn (Peng et al. 2023, arXiv 2309.00071) slow the pairs that turn
    fewer than `slow` times over the `original` context, and leave those that turn more than `fast` times as they are.
    Between them is a ramp, linear in the turns (llama3) or in the pair's number (yarn).
    """

    kind: Literal["none", "linear", "llama3", "yarn"] = "none"
    factor: Positive = 1.0
    original: Count = 8192  # tokens
    slow: Positive = 1.0
    fast: Positive = 4.0
    whole: bool = True  # yarn: the ramp begins and ends at whole pairs
    magnitude: Positive = 1.0  # of what has been turned
    sharpness: Positive = 1.0  # of all scores, in mechanisms that turn only a part of each head (mla)

    def __post_init__(self) -> None:
        check_fields(self, "rope_scaling.")
        if self.slow >= self.fast:
            raise UserError(f"rope_scaling.slow is {self.slow} and fast {self.fast}: give a slow below fast")


UNSCALED = RopeScaling()


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """The fields that all mechanisms have; a mechanism's Config adds its own.

    The class variables describe the mechanism, so that no other module needs to know it by name.
    """

    d_model: Count = 64
    n_heads: Count = 4
    head_dim: Count = 16
    rope_theta: Positive | None = 10_000.0  # base of the rotary frequencies; None: the model adds learned positions
    rope_scaling: RopeScaling = UNSCALED
    bias: bool = False
    dropout: Probability = 0.0  # on attention weights, while training
    impl: Word = "sdpa"  # the kernel; never changed silently

    summary: ClassVar[str] = ""  # one line for people; not set: the first line of the mechanism's file
    formula: ClassVar[str] = ""  # one line of mathematics
    source: ClassVar[str] = ""  # where it was published
    caches: ClassVar[str] = ""  # what its cache holds, in words
    impls: ClassVar[tuple[str, ...]] = (
        "reference",
        "sdpa",
    )  # kernels it can run on; (): it uses none, so `impl` is void
    modes: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # ways to compute the same thing: name -> field overrides
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # further settings that the laws must hold for
    cache_width: ClassVar[str | None] = None  # the field that makes the cache wider or narrower
    carries: ClassVar[str] = "qkvo"  # its projections that mean the same as in multi-head attention
    from_latent: ClassVar[tuple[str, ...]] = ()  # its layers that make keys, then values, from the latent that it notes
    signed: ClassVar[bool] = False  # whether weights in its maps may be negative, or rows add up to more than 1
    chooses: ClassVar[bool] = False  # whether a query reads a choice of what is stored, which rounding can change
    selects: ClassVar[str | None] = None  # the field that limits how many stored tokens a query reads; None: all
    swatch: ClassVar[tuple[int, int, int] | None] = None  # colour, marker, dash, by place in the report's lists
    breaks: ClassVar[tuple[str, ...]] = ()  # laws that it does not obey, as documented

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "summary" not in cls.__dict__:
            cls.summary = (sys.modules[cls.__module__].__doc__ or cls.__doc__ or "").partition("\n")[0]

    def __post_init__(self) -> None:
        check_fields(self)
        if self.rope_theta is not None and self.head_dim % 2:
            raise UserError(f"head_dim is {self.head_dim}: rotary embedding turns pairs, so give an even number")
        if self.impls:
            choose("impl", self.impl, self.impls)

    def set(self, name: str, value: object) -> None:
        """Set a field whose default follows from other fields; for `__post_init__` alone."""
        object.__setattr__(self, name, value)

    @property
    def cache_spec(self) -> CacheSpec:
        """Return the shape of the cache. A mechanism must define it."""
        raise NotImplementedError

    @property
    def rewinds(self) -> bool:
        """Return whether a cache can go back to an earlier token: rows can, rings and running states cannot."""

        def can(spec: CacheSpec) -> bool:
            return spec.keep is None and not spec.state and all(map(can, spec.beside.values()))

        return can(self.cache_spec)

    @property
    def gives(self) -> Mapping[str, tuple[int, ...]]:
        """Return what the layer gives to later ones (`Mask.give`): name -> shape of one token's row."""
        return NOTHING

    @property
    def takes(self) -> Mapping[str, tuple[int, ...]]:
        """Return what it reads of the nearest earlier layer that gives it (`Mask.given`): name -> shape of a row."""
        return NOTHING

    def placed(self, before: Sequence[AttentionConfig], depth: int) -> AttentionConfig:
        """Return the Config for a layer of a model with `depth` layers, whose earlier layers have the Configs `before`.

        Layers are the same at all places, unless a mechanism says otherwise here.
        """
        return self

    @property
    def relative(self) -> bool:
        """Return whether adding the same number to all positions changes nothing."""
        return True

    @checked
    def check_context(self, context: Count) -> None:
        """Raise `UserError` where the mechanism makes no sense in a model of this context, in tokens."""

    @checked
    def flops(self, queries: Total, keys: Total) -> int:
        """Return the FLOPs of the matrix products of one forward pass of one sequence. A mechanism must define it.

        `queries` are the new tokens, `keys` the stored ones, the new ones among them. A multiply-add is two FLOPs, and
        a mask saves none, as a counter sees the reference kernel.
        """
        raise NotImplementedError


@checked
def consecutive(config: AttentionConfig, depth: Count) -> list[AttentionConfig]:
    """Return the Configs of `depth` layers of one mechanism, each placed after those before it."""
    configs: list[AttentionConfig] = []
    for _ in range(depth):
        configs.append(config.placed(configs, depth))
    return configs
