"""What a law questions, and the words it answers in."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..cache import Cache
from ..errors import UserError
from ..spec import AttentionConfig, CacheSpec

Call = Callable[[nn.Module, Tensor], Any]  # how to call somebody's module on x [B T D]

LENGTHS = (2, 3, 5, 13, 37)  # odd ones: a law that fails does so at the shortest of them, so that a reader can follow
LONG = 131  # for modules whose chunks and windows are not known: longer than most


class Broken(Exception):
    """A law does not hold; the text is the counterexample."""


class NotApplicable(Exception):
    """A law says nothing about this module; the text is why."""


@dataclass(frozen=True)
class Subject:
    """One module under question: evaluation mode, parameters shaken, float64 where it can be."""

    name: str
    module: nn.Module
    d_model: int
    call: Call | None = None  # None: our interface
    build: Callable[[], nn.Module] | None = None  # a fresh module of the same shape, other parameters
    lengths: tuple[int, ...] = LENGTHS  # sequence lengths it accepts, ascending
    dtype: torch.dtype = torch.float64
    tolerance: float = 1e-9  # of equality, relative to the largest output

    def x(self, length: int | None = None, batch: int = 2, seed: int = 0) -> Tensor:
        """Random input [B T D]; the last length, the longest, unless told."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(batch, length or self.lengths[-1], self.d_model, generator=generator, dtype=self.dtype)

    def __call__(self, x: Tensor, module: nn.Module | None = None) -> Tensor:
        """y [B T D]; every call draws the same random numbers and finds the module as the first one did."""
        module = module or self.module
        with seeded(0), unchanged(module):
            return self.answer(module, x)

    def answer(self, module: nn.Module, x: Tensor) -> Tensor:
        if self.call is not None:
            return first_tensor(self.call(module, x), x)
        y, _ = module(x, plain(x))
        return y

    def fresh(self) -> Subject:
        """The same question put to a copy, so that what one law does to a module is unknown to the next."""
        module = duplicate(self.module, self.build).to(self.dtype).eval()
        return dataclasses.replace(self, module=module)

    # What follows needs the interface.

    @property
    def config(self) -> AttentionConfig:
        return self.module.config  # type: ignore[return-value]

    def variant(self, **changes: Any) -> nn.Module:
        """The same parameters under a changed config."""
        module = type(self.module)(dataclasses.replace(self.config, **changes)).to(self.dtype).eval()
        module.load_state_dict(self.module.state_dict())
        return module

    def cache(self, batch: int = 2, max_len: int | None = None, *, ragged: bool = True) -> Cache:
        max_len = max_len or self.lengths[-1] + 6
        return Cache.empty(self.config.cache_spec, batch, max_len, ragged=ragged, dtype=self.dtype)

    def feed(
        self, x: Tensor, splits: Sequence[int], cache: Cache, positions: Tensor | None = None, *, start: int = 0
    ) -> tuple[Tensor, Cache]:
        """Decode x in chunks. Positions continue from `start` unless given."""
        positions = plain(x) + start if positions is None else positions
        parts = []
        with torch.no_grad():
            for xs, ps in zip(x.split(list(splits), 1), positions.split(list(splits), 1), strict=True):
                y, cache = self.module(xs, ps, cache)
                parts.append(y)
        return torch.cat(parts, 1), cache


def plain(x: Tensor) -> Tensor:
    """Positions 0, 1, 2, ... [B T]."""
    return torch.arange(x.shape[1]).expand(x.shape[0], -1)


def first_tensor(output: Any, x: Tensor) -> Tensor:
    """y [B T D]: the output, or its first element, or a mapping's first value."""
    y = output
    while not isinstance(y, Tensor):
        if isinstance(y, Mapping) and y:
            y = next(iter(y.values()))
        elif isinstance(y, Sequence) and not isinstance(y, str) and len(y):
            y = y[0]
        else:
            raise UserError(
                f"the module returned {type(output).__name__}: the laws need a tensor [B T D], or a tuple that "
                "begins with one"
            )
    if y.ndim != 3 or y.shape[:2] != x.shape[:2]:
        raise UserError(
            f"for x of shape {list(x.shape)} the module returned {list(y.shape)}: the laws need [B T D] with the "
            "same B and T"
        )
    return y


WIDTHS = (
    *("d_model", "embed_dim", "hidden_size", "n_embd", "dim", "model_dim", "emb_dim", "embed_size", "embedding_dim"),
    *("embed_dims", "dim_model", "emb_size", "hidden_dim", "d_in", "in_features", "input_dim", "width", "channels"),
)
PRECISIONS = {torch.float64: 1e-6, torch.float32: 1e-4}  # with tolerances: others' modules compute parts in float32
CONTEXTS = ("block_size", "context_length", "max_seq_len", "seq_len", "n_ctx", "n_positions", "max_position_embeddings")


def subject(
    module: nn.Module,
    *,
    name: str,
    d_model: int | None = None,
    call: Call | None = None,
    build: Callable[[], nn.Module] | None = None,
    seed: int = 0,
) -> Subject:
    """Prepare a copy of `module` for the laws: evaluation mode, parameters shaken, the best precision it runs in."""
    module = shaken(duplicate(module, build), seed).eval()
    if call is None and speaks(module):
        config: AttentionConfig = module.config  # type: ignore[assignment]
        longest = max(spec.every * (spec.keep or 1) for spec in specs(config.cache_spec))
        lengths = LENGTHS if 3 * longest < LENGTHS[-1] else (*LENGTHS, 3 * longest + 2)
        build = build or (lambda: type(module)(config))
        return Subject(name, module.double(), config.d_model, build=build, lengths=lengths)
    call = call or (lambda module, x: module(x))
    width = d_model or find_number(module, WIDTHS)
    if width is None:
        raise UserError(
            f"the width of {name}'s input is not among its attributes: give d_model, the size of x's last axis"
        )
    why = ""
    for dtype, tolerance in PRECISIONS.items():
        s = Subject(name, module.to(dtype), width, call, build, dtype=dtype, tolerance=tolerance)
        found, why = accepted(s)
        if found:
            return dataclasses.replace(s, lengths=found)
    raise UserError(f"{name} cannot be called on x of shape [2, T, {width}]: {why}")


def duplicate(module: nn.Module, build: Callable[[], nn.Module] | None) -> nn.Module:
    """A module of its own with the same state: built anew where that can be, because a deep copy of a module that keeps
    a closure over its parts still runs the original's."""
    if build is None:
        return copy.deepcopy(module)
    with seeded(0):
        made = build()
    made.load_state_dict(module.state_dict())
    return made


@contextlib.contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """What the module keeps for itself meanwhile, such as keys of its own, is forgotten again."""
    kept = [(part, dict(vars(part)), dict(part._buffers)) for part in module.modules()]
    try:
        yield
    finally:
        for part, attributes, buffers in kept:
            for now, before in ((vars(part), attributes), (part._buffers, buffers)):
                now.clear()
                now.update(before)


def speaks(module: nn.Module) -> bool:
    """Whether it has the interface: a config with a cache_spec, and forward(x, positions, cache, mask)."""
    names = inspect.signature(module.forward).parameters
    return isinstance(getattr(module, "config", None), AttentionConfig) and {"positions", "cache", "mask"} <= set(names)


def shaken(module: nn.Module, seed: int = 0, share: float = 0.1) -> nn.Module:
    """Noise on every parameter, in place: a projection that starts at zero would let every law hold of nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            if p.is_floating_point():
                size = float(p.pow(2).mean().sqrt()) or 0.5
                p.add_((share * size * torch.randn(p.shape, generator=generator)).to(p.dtype))
    return module


def find_number(holder: object, names: Sequence[str]) -> int | None:
    """The first of `names` that is a whole number among the holder's attributes, or among its config's."""
    for place in (holder, getattr(holder, "config", None)):
        for name in names:
            value = getattr(place, name, None)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return None


def accepted(s: Subject) -> tuple[tuple[int, ...], str]:
    """The lengths it can be called with: our odd ones, else what its context suggests; and why not the others."""
    context = find_number(s.module, CONTEXTS)
    why = ""
    for lengths in ((*LENGTHS, LONG), (context,) if context else (), (4, 8, 16, 32, 64, 128)):
        found = []
        for length in lengths:
            try:
                s.fresh()(s.x(length))
                found.append(length)
            except UserError:
                raise
            except Exception as error:
                why = why or one_line(error)
        if found:
            return tuple(found), why
    return (), why


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def specs(spec: CacheSpec) -> Iterator[CacheSpec]:
    """The spec and those of every further memory beside it."""
    yield spec
    for further in spec.beside.values():
        yield from specs(further)


def accepts(s: Subject, length: int) -> bool:
    try:
        s.fresh()(s.x(length))
    except Exception:
        return False
    return True


def movement(new: Tensor, old: Tensor) -> Tensor:
    """How far each token's output moved, [T]; what stops being a number, or starts to be one, moved infinitely far."""
    moved = (new - old).abs().nan_to_num(nan=math.inf, posinf=math.inf)
    return moved.masked_fill(new.isnan() & old.isnan(), 0).amax((0, 2)).detach()


def same(new: Tensor, old: Tensor, tolerance: float, what: str) -> None:
    """Raise `Broken`, naming the first output that differs."""
    if new.shape != old.shape:
        raise Broken(f"{what}: the shape is {list(new.shape)}, not {list(old.shape)}")
    moved = movement(new, old)
    wrong = (moved > tolerance * scale(old)).nonzero().flatten()
    if len(wrong):
        token = int(wrong[0])
        raise Broken(f"{what}, output {token} {by(moved[token])}")


def scale(y: Tensor) -> float:
    """The largest finite size."""
    return float(y.detach().abs().nan_to_num(nan=0, posinf=0).max())


def by(moved: Tensor | float) -> str:
    return "is not a number" if math.isinf(moved) else f"moves by {float(moved):.2g}"


def span(tokens: Sequence[int]) -> str:
    """0, 1, 2, 5 -> "0-2, 5"."""
    parts = []
    for _, run in itertools.groupby(enumerate(tokens), lambda pair: pair[1] - pair[0]):
        run_ = [token for _, token in run]
        parts.append(str(run_[0]) if len(run_) == 1 else f"{run_[0]}-{run_[-1]}")
    return ", ".join(parts)


def finite(y: Tensor, what: str) -> None:
    wrong = (~y.isfinite()).any(2).any(0).nonzero().flatten().tolist()
    if wrong:
        raise Broken(f"{what}, output {wrong[0]} is not a finite number ({len(wrong)} of {y.shape[1]} are not)")


def one_line(error: BaseException) -> str:
    """The exception's name and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
