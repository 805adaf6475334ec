"""The law of bfloat16 over long sequences and through a decoding cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..cache import Cache
from .computation import BUDGET
from .state import duplicate
from .subject import Broken, Subject, positions_of

LONG = 1024  # tokens of the one sequence
DECODED = 192  # of them one at a time, the last ones


def long_bfloat16(s: Subject) -> str:
    """In bfloat16 the error is within the budget over 1024 tokens, in one pass and decoded from a bfloat16 cache.

    A mechanism that chooses among tokens chooses others where scores are nearly equal. Its budget is then what rounding
    the input alone does to it.
    """
    module = s.fresh().module
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter.bfloat16())
    told = []
    x = (2 * s.x(LONG, batch=1)).bfloat16()
    with torch.no_grad():
        exact, _ = module(x.to(s.dtype), positions_of(x))
        budget = BUDGET * torch.finfo(torch.bfloat16).eps
        if s.config.chooses:
            noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=s.dtype)
            moved, _ = module(x * (1 + noise * torch.finfo(torch.bfloat16).eps / 2), positions_of(x))
            budget = max(budget, 2 * _rms(moved - exact) / _rms(exact))
    for words, y in _ways(s, x):
        want = exact[:, -y.shape[1] :]
        error = _rms(y.to(s.dtype) - want) / _rms(want)
        if not error <= budget:
            raise Broken(f"the error {words} is {error:.2g} of the output; the budget is {budget:.2g}")
        told.append(f"{error:.2g} of the output {words}")
    return f"error {', '.join(told)} (budget {budget:.2g})"


def _ways(s: Subject, x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield (words, the last outputs in bfloat16): of one pass, and of steps after a prompt."""
    module = duplicate(s.module, s.build).to(torch.bfloat16).eval()
    with torch.no_grad():
        y, _ = module(x, positions_of(x))
        yield f"over {LONG} tokens", y
        cache = Cache.empty(s.config.cache_spec, 1, LONG, dtype=torch.bfloat16)
        steps = []
        for part, positions in zip(_cut(x), _cut(positions_of(x)), strict=True):
            y, cache = module(part, positions, cache)
            steps.append(y)
        yield f"of {DECODED} tokens decoded after {LONG - DECODED}", torch.cat(steps[1:], 1)


def _cut(t: Tensor) -> tuple[Tensor, ...]:
    return t.split([LONG - DECODED, *[1] * DECODED], 1)


def _rms(t: Tensor) -> float:
    return float(t.pow(2).mean().sqrt())
