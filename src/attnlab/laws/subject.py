"""A subject: the module that a law is put to, and the functions that laws have in common."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..cache import Cache
from ..errors import UserError
from ..spec import AttentionConfig, CacheSpec

ModuleCall = Callable[[nn.Module, Tensor], Any]  # calls somebody's module on x [B T D]

LENGTHS = (2, 3, 5, 13, 37)  # tokens; short ones first, because the shortest counterexample is the easiest to follow
LONGEST = 131  # tokens; for modules whose chunks and windows are not known: longer than most


class Broken(Exception):
    """An exception where a law does not hold. Its text is the counterexample."""


class NotApplicable(Exception):
    """An exception where a law says nothing about a module. Its text is the reason."""


@dataclass(frozen=True)
class Subject:
    """A module that laws are put to: in evaluation mode, its parameters shaken, in float64 if it runs in that."""

    name: str
    module: nn.Module
    d_model: int  # width of its input
    call: ModuleCall | None = None  # None: it has attnlab's interface
    build: Callable[[], nn.Module] | None = None  # a fresh module of the same shape, other parameters
    lengths: tuple[int, ...] = LENGTHS  # tokens; the sequence lengths to try, ascending
    dtype: torch.dtype = torch.float64
    tolerance: float = 1e-9  # of equality, relative to the largest output

    def x(self, length: int | None = None, batch: int = 2, seed: int = 0) -> Tensor:
        """Return random input [B T D]. length: the longest of `lengths` if None."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(batch, length or self.lengths[-1], self.d_model, generator=generator, dtype=self.dtype)

    def __call__(self, x: Tensor, module: nn.Module | None = None) -> Tensor:
        """Return y [B T D]. Every call draws the same random numbers and finds the module as the first one did."""
        module = module or self.module
        with seeded(0), unchanged(module):
            return self.answer(module, x)

    def answer(self, module: nn.Module, x: Tensor) -> Tensor:
        """Return y [B T D] of a plain call, which may change the module."""
        if self.call is not None:
            return first_tensor(self.call(module, x), x)
        y, _ = module(x, positions_of(x))
        return y

    def fresh(self) -> Subject:
        """Return the same subject with a copy of the module, so that no law sees what another did to it."""
        module = duplicate(self.module, self.build).to(self.dtype).eval()
        return dataclasses.replace(self, module=module)

    # The rest needs attnlab's interface.

    @property
    def config(self) -> AttentionConfig:
        """The module's config."""
        return self.module.config  # type: ignore[return-value]

    def variant(self, **changes: Any) -> nn.Module:
        """Return a module with the same parameters and a changed config."""
        module = type(self.module)(dataclasses.replace(self.config, **changes)).to(self.dtype).eval()
        module.load_state_dict(self.module.state_dict())
        return module

    def cache(self, batch: int = 2, max_len: int | None = None, *, ragged: bool = True) -> Cache:
        """Return an empty cache. max_len: tokens; 6 more than the longest of `lengths` if None."""
        max_len = max_len or self.lengths[-1] + 6
        return Cache.empty(self.config.cache_spec, batch, max_len, ragged=ragged, dtype=self.dtype)

    def feed(
        self, x: Tensor, splits: Sequence[int], cache: Cache, positions: Tensor | None = None, *, start: int = 0
    ) -> tuple[Tensor, Cache]:
        """Return y [B T D] and the cache after decoding x in chunks.

        splits: the tokens of each chunk. positions: those from `start` on if None.
        """
        positions = positions_of(x) + start if positions is None else positions
        parts = []
        with torch.no_grad():
            for xs, ps in zip(x.split(list(splits), 1), positions.split(list(splits), 1), strict=True):
                y, cache = self.module(xs, ps, cache)
                parts.append(y)
        return torch.cat(parts, 1), cache

    def left_padded(self) -> LeftPadded:
        """Return sequences of several lengths in one batch, padded on the left to the longest of `lengths`."""
        total = self.lengths[-1]
        lengths = (total, total - 7, total // 2, 1)
        x = self.x(total, batch=len(lengths))
        column = torch.arange(total).expand(len(lengths), -1)
        positions = column - torch.tensor([total - n for n in lengths])[:, None]
        return LeftPadded(x, positions.clamp(min=-1), lengths)


class LeftPadded(NamedTuple):
    """Sequences with pads on the left."""

    x: Tensor  # [B T D]; at pads any numbers
    positions: Tensor  # [B T]; -1 for a pad
    lengths: tuple[int, ...]  # real tokens of each row


def positions_of(x: Tensor) -> Tensor:
    """Return positions 0, 1, 2, ... [B T] for x [B T D]."""
    return torch.arange(x.shape[1]).expand(x.shape[0], -1)


def first_tensor(output: Any, x: Tensor) -> Tensor:
    """Return y [B T D]: the output, or its first element, or a mapping's first value.

    UserError where that is no tensor, or has another batch or length than x [B T D].
    """
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
    call: ModuleCall | None = None,
    build: Callable[[], nn.Module] | None = None,
    seed: int = 0,
) -> Subject:
    """Prepare a copy of `module` for the laws: evaluation mode, parameters shaken, the best precision it runs in.

    d_model: width of its input; None: its attributes tell. call: None: attnlab's interface, or else module(x).
    build: makes a fresh module of the same shape; None: the module is copied. UserError where the width is unknown or
    the module cannot be called.
    """
    module = shaken(duplicate(module, build), seed).eval()
    if call is None and has_interface(module):
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
    """Return another module with the same state, made by `build` or, if that is None, by a deep copy.

    A deep copy of a module that keeps a closure over its parts still runs those of the original.
    """
    if build is None:
        return copy.deepcopy(module)
    with seeded(0):
        made = build()
    made.load_state_dict(module.state_dict())
    return made


@contextlib.contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """Restore afterwards what the module keeps in attributes and buffers, such as keys of its own."""
    kept = [(part, dict(vars(part)), dict(part._buffers)) for part in module.modules()]
    try:
        yield
    finally:
        for part, attributes, buffers in kept:
            for now, before in ((vars(part), attributes), (part._buffers, buffers)):
                now.clear()
                now.update(before)


def has_interface(module: nn.Module) -> bool:
    """Return whether it has attnlab's interface: a config with a cache_spec, forward(x, positions, cache, mask)."""
    names = inspect.signature(module.forward).parameters
    return isinstance(getattr(module, "config", None), AttentionConfig) and {"positions", "cache", "mask"} <= set(names)


def shaken(module: nn.Module, seed: int = 0, share: float = 0.1) -> nn.Module:
    """Add noise to every parameter, in place, and return the module.

    A projection that starts at zero would hide what is behind it. share: size of the noise, relative to the parameter's
    root mean square.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            if p.is_floating_point():
                size = float(p.pow(2).mean().sqrt()) or 0.5
                p.add_((share * size * torch.randn(p.shape, generator=generator)).to(p.dtype))
    return module


def find_number(holder: object, names: Sequence[str]) -> int | None:
    """Return the first of `names` that is a whole number among the holder's attributes, or among its config's."""
    for place in (holder, getattr(holder, "config", None)):
        for name in names:
            value = getattr(place, name, None)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return None


def accepted(s: Subject) -> tuple[tuple[int, ...], str]:
    """Return the lengths it can be called with, and the first reason why not with others.

    LENGTHS and LONGEST are tried first, then the module's context, then powers of two.
    """
    context = find_number(s.module, CONTEXTS)
    why = ""
    for lengths in ((*LENGTHS, LONGEST), (context,) if context else (), (4, 8, 16, 32, 64, 128)):
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
    """Draw the random numbers of `seed`, and afterwards those that would have come without this."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def specs(spec: CacheSpec) -> Iterator[CacheSpec]:
    """Yield the spec and those of every further memory beside it."""
    yield spec
    for further in spec.beside.values():
        yield from specs(further)


def accepts(s: Subject, length: int) -> bool:
    """Return whether the module can be called with this length."""
    try:
        s.fresh()(s.x(length))
    except Exception:
        return False
    return True


def movement(new: Tensor, old: Tensor) -> Tensor:
    """Return how far each token's output moved, the largest difference over batch and width: [T].

    An output that stops being a number, or starts to be one, moved infinitely far.
    """
    moved = (new - old).abs().nan_to_num(nan=math.inf, posinf=math.inf)
    return moved.masked_fill(new.isnan() & old.isnan(), 0).amax((0, 2)).detach()


def require_equal(new: Tensor, old: Tensor, tolerance: float, what: str) -> None:
    """Raise `Broken` where the outputs differ by more than `tolerance`, relative to the largest; name the first."""
    if new.shape != old.shape:
        raise Broken(f"{what}: the shape is {list(new.shape)}, not {list(old.shape)}")
    moved = movement(new, old)
    wrong = (moved > tolerance * scale(old)).nonzero().flatten()
    if len(wrong):
        token = int(wrong[0])
        raise Broken(f"{what}, output {token} {moves_by(moved[token])}")


def scale(y: Tensor) -> float:
    """Return the largest finite size of a number in y."""
    return float(y.detach().abs().nan_to_num(nan=0, posinf=0).max())


def moves_by(moved: Tensor | float) -> str:
    """Return the end of a sentence that begins with the output that moved."""
    return "is not a number" if math.isinf(moved) else f"moves by {float(moved):.2g}"


def ranges(tokens: Sequence[int]) -> str:
    """Return ascending numbers as ranges: 0, 1, 2, 5 -> "0-2, 5"."""
    parts = []
    for _, pairs in itertools.groupby(enumerate(tokens), lambda pair: pair[1] - pair[0]):
        run = [token for _, token in pairs]
        parts.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return ", ".join(parts)


def require_finite(y: Tensor, what: str) -> None:
    """Raise `Broken` where an output in y [B T D] is infinite or not a number."""
    wrong = (~y.isfinite()).any(2).any(0).nonzero().flatten().tolist()
    if wrong:
        raise Broken(f"{what}, output {wrong[0]} is not a finite number ({len(wrong)} of {y.shape[1]} are not)")


def one_line(error: BaseException) -> str:
    """Return the exception's name and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
