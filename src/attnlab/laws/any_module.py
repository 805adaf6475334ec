"""Laws of any module that maps x [B T D] to y [B T D]."""

from __future__ import annotations

import copy
import io
import itertools
import math
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..cache import load_cache, save_cache
from ..spec import CacheSpec
from .subject import (
    Broken,
    NotApplicable,
    Subject,
    accepts,
    movement,
    moves_by,
    one_line,
    ranges,
    require_equal,
    require_finite,
    scale,
    seeded,
    shaken,
)


def causality(s: Subject) -> str:
    """No output depends on a later token."""
    for length, size in itertools.product(s.lengths, (1.0, 0.01, 100.0)):
        _require_causal_values(s, s.module, s.x(length), size, "")
    _require_causal_gradients(s, s.module, "")
    for module, when in training(s):
        for length in s.lengths[-2:]:
            _require_causal_values(s, module, s.x(length), 1.0, when)
        _require_causal_gradients(s, module, when)
    return f"no output moves when a later token changes, up to {s.lengths[-1]} tokens, in value or in gradient"


def _require_causal_values(s: Subject, module: nn.Module, x: Tensor, size: float, when: str) -> None:
    """Raise `Broken` where a change of this size moves an earlier output; name the largest movement."""
    y = s(x, module).detach()
    worst = s.tolerance * scale(y)
    broken = None
    for later, changed in _changes(x, size):
        moved = movement(s(changed, module), y)[:later]
        if float(moved.max()) > worst:
            worst = float(moved.max())
            broken = f"output {int(moved.argmax())} {moves_by(worst)} when token {later} changes"
    if broken:
        raise Broken(f"{when}{broken} ({x.shape[1]} tokens)")


def _require_causal_gradients(s: Subject, module: nn.Module, when: str) -> None:
    """Raise `Broken` where an output has a gradient on a later token."""
    length = max(n for n in s.lengths if n <= 13 or n == s.lengths[0])
    for token, gradient in _gradients(s, module, s.x(length)):
        worst = float(gradient[token + 1 :].max()) if token + 1 < length else 0.0
        if worst > s.tolerance * float(gradient.max()):
            later = token + 1 + int(gradient[token + 1 :].argmax())
            raise Broken(f"{when}output {token} has gradient {worst:.2g} on token {later} ({length} tokens)")


def _changes(x: Tensor, size: float) -> Iterator[tuple[int, Tensor]]:
    """Yield (the first changed token, changed x): single tokens, or in long sequences some tokens and all after them.

    Changes as well as gradients, because choosing the best k has no gradient; of several sizes, because a choice may
    only tip for large ones.
    """
    length = x.shape[1]
    short = length <= 13
    noise = size * torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    for first in range(1, length, 1 if short else max(3, length // 13)):
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


def no_dead_parameters(s: Subject) -> str:
    """Every trainable parameter gets a gradient, and no large part of a projection goes without."""
    module = s.fresh().module.train()
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not trainable:
        raise NotApplicable("it has no trainable parameter")
    alive = _alive(s, module, trainable)
    dead = [name for name, some in alive.items() if not some.any()]
    if dead:
        raise Broken(
            f"{', '.join(dead)} {'get' if len(dead) > 1 else 'gets'} no gradient: the output does not depend on it"
        )
    for name, some in alive.items():
        if _is_projection(module, name, some):
            _require_no_idle_part(name, some)
    return f"all {len(trainable)} parameters get a gradient"


def _alive(s: Subject, module: nn.Module, trainable: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return for each parameter which of its numbers get a gradient from some of several inputs, bool."""
    alive = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in trainable.items()}
    for seed in range(4):
        y = s(s.x(batch=4, seed=seed), module)
        if not y.requires_grad:
            raise Broken("the output has no gradient at all: it was computed without one")
        weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=y.dtype)
        gradients = torch.autograd.grad((y * weight).sum(), list(trainable.values()), allow_unused=True)
        for name, gradient in zip(trainable, gradients, strict=True):
            if gradient is not None:
                alive[name] |= gradient != 0
    return alive


def _is_projection(module: nn.Module, name: str, weight: Tensor) -> bool:
    """Return whether the parameter is a matrix by which a layer multiplies all its input."""
    owner = module.get_submodule(name.rpartition(".")[0])
    linear = isinstance(owner, nn.Linear) or type(owner).__name__ == "Conv1D" or name.endswith("in_proj_weight")
    return weight.ndim == 2 and linear


def _require_no_idle_part(name: str, alive: Tensor) -> None:
    """Raise `Broken` where a quarter of the rows or columns of a matrix get no gradient."""
    for axis, word in ((1, "rows"), (0, "columns")):
        idle = (~alive.any(axis)).nonzero().flatten().tolist()
        if 4 * len(idle) >= alive.shape[1 - axis]:
            raise Broken(f"{word} {ranges(idle)} of {name} get no gradient: that part of the projection is discarded")


def batch_independence(s: Subject) -> str:
    """A sequence's output does not depend on its neighbours in the batch, nor on their order or number."""
    x = s.x(batch=3)
    other = s.x(batch=3, seed=5)
    changed = torch.cat([x[:1], 3 * other[1:]])
    for module, when in ((s.module, ""), *training(s)):
        y = s(x, module)
        moved = float(movement(s(changed, module)[:1], y[:1]).max())
        if moved > s.tolerance * scale(y):
            raise Broken(f"{when}sequence 0 {moves_by(moved)} when sequences 1 and 2 of its batch change")
    y = s(x)
    require_equal(s(x.flip(0)).flip(0), y, s.tolerance, "with the batch in reverse order")
    require_equal(s(x[:1]), y[:1], s.tolerance, "with sequence 0 alone in its batch")
    return "neighbours, their order and their number change nothing"


def determinism(s: Subject) -> str:
    """The same input gives the same output, whatever was asked in between, and is itself left alone."""
    module = s.fresh().module
    x = s.x()
    kept = x.clone()
    y = s.answer(module, x)
    if not torch.equal(x, kept):
        raise Broken(f"the module writes into its input: token {int((x != kept).any(2).any(0).nonzero()[0])} changes")
    try:
        again = s.answer(module, kept.clone())
    except Exception as error:
        raise Broken(f"asked the same twice, the second time it stops with {one_line(error)}") from None
    require_equal(again, y, 0, "asked the same twice in evaluation mode")
    s.answer(module, s.x(s.lengths[0], seed=7))
    require_equal(s.answer(module, kept.clone()), y, 0, "asked the same again after another input")
    return "equal to the last bit when asked again"


def finiteness(s: Subject) -> str:
    """Outputs and gradients are finite: for small, large, constant and all-zero input, and for a single token."""
    shortest = (1,) if accepts(s, 1) else ()
    x = s.x()
    inputs = {"ordinary": x, "zero": 0 * x, "constant": x[:, :1].expand_as(x), "a thousand times larger": 1e3 * x}
    cases = [(f"{word} input", value) for word, value in inputs.items()]
    cases += [(f"{n} token{'s' * (n > 1)}", s.x(n)) for n in (*shortest, *s.lengths)]
    for what, value in cases:
        value = value.detach().clone().requires_grad_()
        y = s(value)
        require_finite(y, f"with {what}")
        if y.requires_grad and "zero" not in what:
            (gradient,) = torch.autograd.grad(y.sum(), value, allow_unused=True)
            if gradient is not None:
                require_finite(gradient, f"with {what}, in the gradient")
    return "finite for ordinary, zero, constant and thousandfold input" + (", and for one token" if shortest else "")


def save_and_load(s: Subject) -> str:
    """A fresh module that loads the saved parameters gives the same output; so does a saved and loaded cache."""
    x = s.x()
    y = s(x)
    with seeded(11):
        fresh = shaken(s.build() if s.build else copy.deepcopy(s.module), seed=11).to(s.dtype).eval()
    file = io.BytesIO()
    torch.save(s.module.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    require_equal(s(x, fresh), y, 0, "after its state was saved and loaded into a fresh module")
    if s.call is not None:
        return "equal to the last bit after a round trip"
    cut = x.shape[1] - 3
    _, cache = s.feed(x[:, :cut], [cut], s.cache())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cache.safetensors"
        save_cache([cache], path)
        (loaded,) = load_cache(path)
    got, _ = s.feed(x[:, cut:], [1, 2], loaded, start=cut)
    require_equal(got, y[:, cut:], s.tolerance, "decoding on from a saved and loaded cache")
    return "equal after a round trip, and decoding goes on from a loaded cache"
