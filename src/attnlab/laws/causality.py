"""Laws of causality: an output depends on earlier tokens and on no later one."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from ..spec import CacheSpec
from .subject import (
    Broken,
    NotApplicable,
    Subject,
    magnitudes,
    movement,
    moves_by,
    ranges,
    scale,
)

QUICK = 300  # tokens; longer sequences are changed at fewer places
ROUNDED = 1e-2  # tolerance of equality where parts are computed in bfloat16


def causality(s: Subject) -> str:
    """No output depends on a later token, whatever the size of the input, in every mode of computing."""
    for length, size in itertools.product(s.lengths, (1.0, 0.01, 100.0)):
        _require_causal_values(s, s.module, s.x(length), size, "")
    for length in (s.short, s.lengths[-1]):
        for words, x in magnitudes(s.x(length)).items():
            _require_causal_values(s, s.module, x, max(1.0, scale(x)), f"for {words} input, ")
    for length in s.tiles:
        _require_causal_values(s, s.module, s.x(length, batch=1), 1.0, "", firsts=_at_edges(length))
    _require_causal_gradients(s, s.module, "")
    for module, when in training(s):
        for length in s.lengths[-2:]:
            _require_causal_values(s, module, s.x(length), 1.0, when)
        _require_causal_gradients(s, module, when)
    for context, subject, when in _other_modes(s):
        with context:
            _require_causal_values(subject, subject.module, subject.x(), 1.0, when)
    return f"no output moves when a later token changes, up to {s.longest} tokens, in value or in gradient"


def prefix(s: Subject) -> str:
    """The outputs of the first n tokens are what these tokens give alone: how many follow changes nothing."""
    lengths = sorted({*s.lengths, *s.tiles})
    if len(lengths) < 2:
        raise NotApplicable(f"it can be called with {lengths[0]} tokens only")
    x = s.x(lengths[-1])
    with torch.no_grad():
        parts = {length: s(x[:, :length].contiguous()) for length in lengths}
    for shorter, longer in itertools.combinations(lengths, 2):
        moved = movement(parts[longer][:, :shorter], parts[shorter])
        wrong = (moved > s.tolerance * scale(parts[shorter])).nonzero().flatten()
        if len(wrong):
            token = int(wrong[0])
            raise Broken(
                f"output {token} of the first {shorter} tokens {moves_by(moved[token])} when {longer - shorter} "
                f"tokens are appended: y(x)[:, :{shorter}] is not y(x[:, :{shorter}])"
            )
    return f"the first n of {lengths[-1]} outputs are those of n tokens alone, for n = {', '.join(map(str, lengths))}"


def _other_modes(s: Subject) -> Iterator[tuple[AbstractContextManager[Any], Subject, str]]:
    """Yield (a context, the subject in it, words for it) for each other mode in which the subject runs."""
    yield torch.no_grad(), s, "without gradients, "
    yield torch.inference_mode(), s, "in inference mode, "
    single = s.cast(torch.float32, ROUNDED)
    with contextlib.suppress(Exception):
        with torch.autocast("cpu", torch.bfloat16):
            single(single.x())
        yield torch.autocast("cpu", torch.bfloat16), single, "under autocast, "


def _at_edges(length: int) -> tuple[int, ...]:
    """Return the tokens from which a long sequence is changed: the last, and others where that is quick."""
    if length > QUICK:
        return (length // 2, length - 1)
    return tuple(sorted({length // 4, length // 2, length - length // 4, length - 2, length - 1}))


def _require_causal_values(
    s: Subject, module: nn.Module, x: Tensor, size: float, when: str, *, firsts: Sequence[int] = ()
) -> None:
    """Raise `Broken` where a change of this size moves an earlier output; name the largest movement.

    firsts: the tokens from which x is changed; chosen by the length if empty.
    """
    y = s(x, module).detach()
    worst = s.tolerance * scale(y)
    broken = None
    for later, changed in _changes(x, size, firsts):
        moved = movement(s(changed, module), y)[:later]
        if float(moved.max()) > worst:
            worst = float(moved.max())
            broken = f"output {int(moved.argmax())} {moves_by(worst)} when token {later} changes"
    if broken:
        raise Broken(f"{when}{broken} ({x.shape[1]} tokens)")


def _require_causal_gradients(s: Subject, module: nn.Module, when: str) -> None:
    """Raise `Broken` where an output has a gradient on a later token."""
    if s.no_gradients:
        return
    length = s.short
    for token, gradient in _gradients(s, module, s.x(length)):
        worst = float(gradient[token + 1 :].max()) if token + 1 < length else 0.0
        if worst > s.tolerance * float(gradient.max()):
            later = token + 1 + int(gradient[token + 1 :].argmax())
            raise Broken(f"{when}output {token} has gradient {worst:.2g} on token {later} ({length} tokens)")


def _changes(x: Tensor, size: float, firsts: Sequence[int] = ()) -> Iterator[tuple[int, Tensor]]:
    """Yield (the first changed token, changed x): single tokens, or in long sequences some tokens and all after them.

    Changes as well as gradients, because choosing the best k has no gradient; of several sizes, because a choice may
    only tip for large ones.
    """
    length = x.shape[1]
    short = length <= 13
    noise = size * torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    for first in firsts or range(1, length, 1 if short else max(3, length // 13)):
        changed = x.clone()
        until = first + 1 if short else length
        changed[:, first:until] += noise[:, first:until]
        yield first, changed


def _gradients(s: Subject, module: nn.Module, x: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield each output token, and the size of its gradient on every input token, [T]."""
    x = x.requires_grad_()
    y = s(x, module)
    if not y.requires_grad:
        return
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=y.dtype)
    for token in range(x.shape[1]):
        value = (y[:, token] * weight[:, token]).sum()
        (gradient,) = torch.autograd.grad(value, x, retain_graph=True, allow_unused=True)
        if gradient is not None:
            yield token, gradient.abs().nan_to_num(nan=math.inf).amax((0, 2))


def training(s: Subject) -> tuple[tuple[nn.Module, str], ...]:
    """Return (the module in training mode, words for it), or nothing where it cannot be called so on its own.

    Statistics of a batch may leak in training mode and nowhere else.
    """
    module = s.fresh().module.train()
    try:
        s(s.x(s.lengths[-1]), module)
    except Exception:
        return ()
    return ((module, "in training mode, "),)


def mixing(s: Subject) -> str:
    """Outputs depend on earlier tokens."""
    if s.call is None and _sees_only_itself(s.config.cache_spec):
        raise NotApplicable("its config says that a token sees only itself")
    length = s.lengths[-1]
    x = s.x(length)
    y = s(x).detach()
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype)
    seen: list[list[int]] = [[] for _ in range(length)]
    width = max(1, length // 40)  # tokens changed together
    for first in range(0, length - width, width):
        changed = x.clone()
        changed[:, first : first + width] += noise[:, first : first + width]
        moved = movement(s(changed), y)
        for later in (moved > 1e-4 * s.tolerance * scale(y)).nonzero().flatten().tolist():
            if later >= first + width:
                seen[later] += range(first, first + width)
    blind = [token for token in range(width, length) if not seen[token]]
    if len(blind) == length - width:
        raise Broken(
            f"no output depends on any earlier token: output {length - 1} moves only when token {length - 1} does"
        )
    for token, after in itertools.pairwise(blind):
        if after == token + 1:
            raise Broken(f"outputs {ranges(blind)} depend on no earlier token ({length} tokens)")
    last = f"output {length - 1} depends on {len(seen[-1])} earlier tokens: {ranges(seen[-1])}"
    return last + (f"; outputs {ranges(blind)} depend on none" if blind else "")


def _sees_only_itself(spec: CacheSpec) -> bool:
    return spec.keep == 1 and not spec.state and not spec.beside
