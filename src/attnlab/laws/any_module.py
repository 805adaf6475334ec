"""Laws of any module that maps x [B T D] to y [B T D]."""

from __future__ import annotations

import copy
import io
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..cache import load_cache, save_cache
from .causality import training
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
