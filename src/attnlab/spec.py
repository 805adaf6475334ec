"""What every attention mechanism shares. Pure Python: no framework is imported here.

One legend of shape letters for the package: B batch, L new tokens, S stored tokens, N query heads, K key/value heads,
H head size, V value size, D model size, R rank.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from .errors import UserError, choose


@dataclass(frozen=True)
class Mask:
    """Who may see whom, decided by position alone; data, so that a kernel can read it instead of calling it."""

    window: int | None = None  # a query sees itself and the window - 1 positions before it
    plain: bool = False  # a promise: every row holds positions 0, 1, 2, ..., padding only after them, as if by index

    def __call__(self, q: Any, k: Any) -> Any:
        """Whether the query at position `q` sees the key at `k`; any broadcasting arrays: NumPy, Torch, JAX."""
        seen = (k >= 0) & (k <= q)
        return seen if self.window is None else seen & (q - k < self.window)


CAUSAL = Mask()


@dataclass(frozen=True)
class CacheSpec:
    """What one layer remembers about one sequence, and for how long."""

    rows: Mapping[str, tuple[int, ...]]  # name -> shape of what one remembered token costs
    keep: int | None = None  # remember only the last `keep` rows; None remembers all
    state: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # size independent of the number of tokens
    every: int = 1  # one row per completed group of `every` tokens
    beside: Mapping[str, CacheSpec] = field(default_factory=dict)  # further memories with a pace of their own
    reads: Mapping[str, int] = field(default_factory=dict)  # name -> most rows that one step reads, where not all

    def floats(self, tokens: int) -> int:
        """Floats that one sequence of `tokens` tokens costs. Benchmarks, report, docs and the size law read this."""
        own = self.slots(tokens) * self._row + sum(math.prod(shape) for shape in self.state.values())
        return own + sum(spec.floats(tokens) for spec in self.beside.values())

    def read(self, tokens: int) -> int:
        """Floats of these that one step has to read."""
        unread = {name: max(self.slots(tokens) - most, 0) for name, most in self.reads.items()}
        own = self.floats(tokens) - sum(rows * math.prod(self.rows[name]) for name, rows in unread.items())
        return own - sum(spec.floats(tokens) - spec.read(tokens) for spec in self.beside.values())

    def slots(self, tokens: int) -> int:
        """Rows held once `tokens` tokens have passed."""
        rows = tokens // self.every
        return rows if self.keep is None else min(rows, self.keep)

    @property
    def per_token(self) -> float:
        """Floats that each further token costs in the long run; 0 for a ring or a fixed state."""
        own = 0.0 if self.keep is not None else self._row / self.every
        return own + sum(spec.per_token for spec in self.beside.values())

    @property
    def _row(self) -> int:
        return sum(math.prod(shape) for shape in self.rows.values())


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary pairs are slowed so that a model reaches further than it was first trained: all of them by `factor`
    (linear), or those that turn fewer than `slow` times over the `original` context, with a ramp up to those that turn
    more than `fast` times and stay. The ramp is even in turns (llama3) or in the pair's number (yarn, Peng et al. 2023,
    arXiv 2309.00071)."""

    kind: Literal["none", "linear", "llama3", "yarn"] = "none"
    factor: float = 1.0
    original: int = 8192  # tokens
    slow: float = 1.0
    fast: float = 4.0
    whole: bool = True  # yarn: the ramp begins and ends at whole pairs
    magnitude: float = 1.0  # of what has been turned
    sharpness: float = 1.0  # of all scores, in mechanisms that turn only a part of each head (mla)

    def __post_init__(self) -> None:
        choose("kind of rope scaling", self.kind, ("none", "linear", "llama3", "yarn"))
        if self.factor <= 0 or self.original < 1 or not 0 < self.slow < self.fast:
            raise UserError(
                f"rope scaling has factor {self.factor}, original {self.original}, slow {self.slow} and fast "
                f"{self.fast}: give a factor above 0, at least one token, and a slow above 0 and below fast"
            )


UNSCALED = RopeScaling()


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """The fields that fix a mechanism's input and output shapes; subclasses add their own.

    The class variables are how a mechanism speaks about itself, so that nobody has to ask it by name.
    """

    d_model: int = 64
    n_heads: int = 4
    head_dim: int = 16
    rope_theta: float | None = 10_000.0  # None: no rotary embedding; the model adds learned positions
    rope_scaling: RopeScaling = UNSCALED
    bias: bool = False
    dropout: float = 0.0  # on attention weights, while training
    impl: str = "sdpa"  # which kernel; never changed silently

    summary: ClassVar[str] = ""  # the first line of the mechanism's file
    formula: ClassVar[str] = ""  # one line of mathematics
    source: ClassVar[str] = ""  # where it was published
    caches: ClassVar[str] = ""  # what it remembers, in words
    impls: ClassVar[tuple[str, ...]] = ("reference", "sdpa")  # kernels it can run on
    modes: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # ways to compute the same thing: name -> field overrides
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # further settings that the laws must hold for
    cache_width: ClassVar[str | None] = None  # the field that makes the cache wider or narrower
    carries: ClassVar[str] = "qkvo"  # its projections that mean what they do in multi-head attention
    from_latent: ClassVar[tuple[str, ...]] = ()  # its layers that make keys, then values, from the latent that it notes
    selects: ClassVar[str | None] = None  # the field that limits how many stored tokens a query reads; None: all
    breaks: ClassVar[tuple[str, ...]] = ()  # laws that it is known, and documented, not to obey

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.summary = (sys.modules[cls.__module__].__doc__ or cls.__doc__ or "").partition("\n")[0]

    def __post_init__(self) -> None:
        for name in ("d_model", "n_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.rope_theta is not None and self.head_dim % 2:
            raise UserError(f"head_dim is {self.head_dim}: rotary embedding turns pairs, so give an even number")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout is {self.dropout}: it is a probability from 0 up to, but not including, 1")
        choose("impl", self.impl, self.impls)

    def set(self, name: str, value: object) -> None:
        """Fill in a default that follows from other fields (only from `__post_init__`)."""
        object.__setattr__(self, name, value)

    @property
    def cache_spec(self) -> CacheSpec:
        raise NotImplementedError

    @property
    def rewinds(self) -> bool:
        """Whether a cache can be taken back to an earlier token: rows can, rings and running states cannot."""

        def can(spec: CacheSpec) -> bool:
            return spec.keep is None and not spec.state and all(map(can, spec.beside.values()))

        return can(self.cache_spec)

    @property
    def relative(self) -> bool:
        """Whether moving all positions by the same amount changes nothing."""
        return True

    def check_context(self, context: int) -> None:
        """Raise a `UserError` where the mechanism makes no sense in a model of this context."""

    def flops(self, queries: int, keys: int) -> int:
        """Matrix-product FLOPs of one forward pass of one sequence: `queries` new tokens, `keys` stored with them.

        Dense count, two per multiply-add, as a counter sees the reference kernel: a mask saves nothing.
        """
        raise NotImplementedError
