"""A subject: the module that a law is put to, and the functions that laws have in common."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..cache import Cache
from ..spec import AttentionConfig
from .call import first_tensor, no_exit
from .stack import Stack
from .state import duplicate, seeded, tensors_in, unchanged

ModuleCall = Callable[[nn.Module, Tensor], Any]  # calls somebody's module on x [B T D]
StepCall = Callable[[nn.Module, Tensor, Any, int], tuple[Any, Any]]  # (module, x, cache, start) -> (y, cache)

LENGTHS = (2, 3, 5, 13, 37)  # tokens; short ones first, because the shortest counterexample is the easiest to follow


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
    tiles: tuple[int, ...] = ()  # tokens; longer lengths, around the tile sizes of kernels
    dtype: torch.dtype = torch.float64
    tolerance: float = 1e-9  # of equality, relative to the largest output
    step: StepCall | None = None  # decodes a chunk of somebody's module; None: not known
    no_gradients: str = ""  # why it runs without gradients only; empty: it has them

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
        return first_tensor(self.output(module, x), x)

    def output(self, module: nn.Module, x: Tensor) -> Any:
        """Return all that a plain call returns."""
        with no_exit(), torch.no_grad() if self.no_gradients else contextlib.nullcontext():
            if self.call is not None:
                return self.call(module, x)
            return module(x, positions_of(x))

    @property
    def short(self) -> int:
        """The longest of `lengths` up to 13, where every token can be looked at; else the shortest."""
        return max(n for n in self.lengths if n <= 13 or n == self.lengths[0])

    @property
    def longest(self) -> int:
        """The longest sequence that is tried."""
        return max(self.lengths[-1], *self.tiles, 0)

    def require_gradients(self) -> None:
        """Raise `NotApplicable` where the module runs without gradients only."""
        if self.no_gradients:
            raise NotApplicable(f"it runs without gradients only: {self.no_gradients}")

    def fresh(self) -> Subject:
        """Return the same subject with a copy of the module, so that no law sees what another did to it."""
        module = duplicate(self.module, self.build).to(self.dtype).eval()
        return dataclasses.replace(self, module=module)

    def cast(self, dtype: torch.dtype, tolerance: float) -> Subject:
        """Return the same subject in another precision."""
        module = duplicate(self.module, self.build).to(dtype).eval()
        return dataclasses.replace(self, module=module, dtype=dtype, tolerance=tolerance)

    # Decoding: with attnlab's cache, or by the step of somebody's module.

    @property
    def raggeds(self) -> tuple[bool, ...]:
        """The kinds of cache to try: attnlab's for sequences of equal and of several lengths."""
        return (False, True) if self.call is None else (False,)

    def cache(self, batch: int = 2, max_len: int | None = None, *, ragged: bool = True) -> Any:
        """Return an empty cache; None for somebody's module. max_len: tokens; 6 more than `lengths` if None."""
        if self.call is not None:
            return None
        max_len = max_len or self.lengths[-1] + 6
        return Cache.empty(self.config.cache_spec, batch, max_len, ragged=ragged, dtype=self.dtype)

    def feed(
        self, x: Tensor, splits: Sequence[int], cache: Any, positions: Tensor | None = None, *, start: int = 0
    ) -> tuple[Tensor, Any]:
        """Return y [B T D] and the cache after decoding x in chunks.

        splits: the tokens of each chunk. positions: those from `start` on if None.
        """
        positions = positions_of(x) + start if positions is None else positions
        parts = []
        with torch.no_grad():
            for xs, ps in zip(x.split(list(splits), 1), positions.split(list(splits), 1), strict=True):
                if self.step is None:
                    y, cache = self.module(xs, ps, cache)
                else:
                    output, cache = self.step(self.module, xs.contiguous(), cache, start)
                    y = first_tensor(output, xs)
                    start += xs.shape[1]
                parts.append(y)
        return torch.cat(parts, 1), cache

    # The rest needs attnlab's interface.

    @property
    def config(self) -> AttentionConfig:
        """The module's config."""
        return self.module.config  # type: ignore[return-value]

    @property
    def layers(self) -> list[nn.Module]:
        """The module, or the layers of a stack."""
        return list(self.module.layers) if isinstance(self.module, Stack) else [self.module]

    def variant(self, **changes: Any) -> nn.Module:
        """Return a module with the same parameters and a changed config."""
        module = type(self.module)(dataclasses.replace(self.config, **changes)).to(self.dtype).eval()
        module.load_state_dict(self.module.state_dict())
        return module

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


def magnitudes(x: Tensor) -> dict[str, Tensor]:
    """Return inputs of other sizes than x, with words for each."""
    return {
        "zero": 0 * x,
        "constant": x[:, :1].expand_as(x).contiguous(),
        "a hundred times larger": 1e2 * x,
        "a thousand times larger": 1e3 * x,
    }


def positions_of(x: Tensor) -> Tensor:
    """Return positions 0, 1, 2, ... [B T] for x [B T D]."""
    return torch.arange(x.shape[1]).expand(x.shape[0], -1)


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


def every_output(output: Any) -> list[Tensor]:
    """Return all tensors with a gradient that a module returned: a parameter may learn from a second output."""
    return [t for t in tensors_in(output) if t.requires_grad]
