"""Laws of any module that maps x [B T D] to y [B T D]."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import io
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..cache import load_cache, save_cache
from ..recording import record_losses
from .call import in_full, one_line
from .causality import training
from .prepare import accepts, shaken
from .state import seeded, unchanged
from .subject import (
    Broken,
    NotApplicable,
    Subject,
    every_output,
    magnitudes,
    movement,
    moves_by,
    ranges,
    require_equal,
    require_finite,
    scale,
)


def no_dead_parameters(s: Subject) -> str:
    """Every trainable parameter gets a gradient, and no large part of a projection goes without."""
    s.require_gradients()
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
        with seeded(0), unchanged(module), record_losses() as losses:
            output = s.output(module, s.x(batch=4, seed=seed))
        outputs = every_output([output, losses])
        if not outputs:
            raise Broken("the output has no gradient at all: it was computed without one")
        generator = torch.Generator().manual_seed(seed)
        weighted = [(y * torch.randn(y.shape, generator=generator, dtype=y.dtype)).sum() for y in outputs]
        gradients = torch.autograd.grad(torch.stack(weighted).sum(), list(trainable.values()), allow_unused=True)
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
    short = s.x(s.lengths[0])
    brief = s.answer(module, short.clone())
    kept = x.clone()
    y = s.answer(module, x)
    if not torch.equal(x, kept):
        raise Broken(f"the module writes into its input: token {int((x != kept).any(2).any(0).nonzero()[0])} changes")
    try:
        again = s.answer(module, kept.clone())
    except Exception as error:
        raise Broken(f"asked the same twice, the second time it stops with {one_line(error)}") from None
    require_equal(again, y, 0, "asked the same twice in evaluation mode")
    what = f"{s.lengths[-1]} tokens, asked after {s.lengths[0]}"
    require_equal(y, s(kept.clone()), 0, f"{what} and asked of a fresh module")
    for words, ask in _between(s):
        ask(module)
        for length, value, before in ((s.lengths[0], short, brief), (s.lengths[-1], kept, y)):
            what = f"{length} tokens, asked again after {words}"
            require_equal(s.answer(module, value.clone()), before, 0, what)
    return "equal to the last bit when asked again, after longer, shorter, larger and more inputs"


def _between(s: Subject) -> Iterator[tuple[str, Callable[[nn.Module], Any]]]:
    """Yield (words, a call) to make between two equal questions; among them one longer than any made before."""
    beyond = next((n for n in (s.longest + 64, s.longest + 1) if accepts(s, n)), s.longest)
    inputs = {
        "a short input": s.x(s.lengths[0], seed=7),
        "a long input": s.x(beyond, seed=7),
        "an input a hundred times larger": 100 * s.x(seed=7),
        "a larger batch": s.x(batch=5, seed=7),
    }
    for words, x in inputs.items():
        yield words, functools.partial(_answer, s, x)
    if s.step is not None and s.lengths[-1] > 3:
        yield "decoding other tokens", functools.partial(_decode, s)


def _answer(s: Subject, x: Tensor, module: nn.Module) -> None:
    s.answer(module, x)


def _decode(s: Subject, module: nn.Module) -> None:
    dataclasses.replace(s, module=module).feed(s.x(4, seed=7), [3, 1], None)


def modes(s: Subject) -> str:
    """Without gradients, in inference mode, in training mode, and for x in another layout of memory it runs, and right.

    Training mode may give other outputs (dropout), but has to run.
    """
    x = s.x()
    y = s(x)
    for context, words in ((torch.no_grad(), "without gradients"), (torch.inference_mode(), "in inference mode")):
        with context:
            got = s(x.clone())
        require_equal(got.clone(), y, s.tolerance, words)
    for words, value in _layouts(x).items():
        require_equal(_or_broken(s, value, f"for x {words}"), y, s.tolerance, f"for x {words}")
    _or_broken(dataclasses.replace(s, module=s.fresh().module.train()), x, "in training mode")
    told = "equal without gradients, in inference mode and for x in other layouts; training mode runs"
    if s.no_gradients:
        return told
    _require_two_training_steps(s)
    return told + _inference_leftovers(s)


def _layouts(x: Tensor) -> dict[str, Tensor]:
    """Return x [B T D] with the same numbers in other places of memory, with words for each."""
    wide = torch.cat([x, x], -1)
    return {
        "that is a transposed view": x.transpose(0, 1).contiguous().transpose(0, 1),
        "that is a part of a wider tensor": wide[..., : x.shape[-1]],
        "with its width as the first axis in memory": x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    }


def _or_broken(s: Subject, x: Tensor, what: str) -> Tensor:
    """Return y [B T D]. Raise `Broken` where the call stops, though an ordinary one did not."""
    try:
        return s(x)
    except Exception as error:
        raise Broken(f"{what} it stops with {in_full(error)}, though an ordinary call does not") from None


def _require_two_training_steps(s: Subject) -> None:
    """Raise `Broken` where the first training step runs and the second does not, as where a graph is kept."""
    module = s.fresh().module.train()
    for number in (1, 2):
        try:
            y = s.answer(module, s.x(seed=number))
            if y.requires_grad:
                y.sum().backward()
        except Exception as error:
            if number == 1:  # what stops every step is for another law
                return
            raise Broken(f"a second training step stops with {in_full(error)}, though the first does not") from None


def _inference_leftovers(s: Subject) -> str:
    """Return words for tensors that a call in inference mode leaves behind, with which a later backward pass stops.

    It stops loudly and computes nothing wrong, so it is told and breaks no law.
    """
    module = s.fresh().module
    with torch.inference_mode():
        s.answer(module, s.x())
    try:
        y = s.answer(module, s.x().requires_grad_())
        if y.requires_grad:
            y.sum().backward()
    except Exception as error:
        return f"; but after a call in inference mode a backward pass stops: {one_line(error)}"
    return ""


def finiteness(s: Subject) -> str:
    """Outputs and gradients are finite: for small, large, constant and all-zero input, and for a single token."""
    shortest = (1,) if accepts(s, 1) else ()
    x = s.x()
    cases = [("ordinary input", x), *((f"{words} input", value) for words, value in magnitudes(x).items())]
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
    for length in s.lengths:
        used = s.fresh().module
        s.answer(used, s.x(length, seed=9))
        _loaded(s, used, f"after {length} tokens")
    trained = s.fresh().module
    with contextlib.suppress(Exception):  # whether it runs in training mode is for another law
        s.answer(trained.train(), s.x(seed=9))
    for module, when in ((s.module, "as it was made"), (trained.eval(), "after a call in training mode")):
        fresh = _loaded(s, module, when)
        require_equal(
            s(x, fresh), s(x, module), 0, f"after its state, {when}, was saved and loaded into a fresh module"
        )
    if s.call is not None:
        return "equal to the last bit after a round trip"
    y = s(x)
    cut = x.shape[1] - 3
    _, cache = s.feed(x[:, :cut], [cut], s.cache())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cache.safetensors"
        save_cache([cache], path)
        (loaded,) = load_cache(path)
    got, _ = s.feed(x[:, cut:], [1, 2], loaded, start=cut)
    require_equal(got, y[:, cut:], s.tolerance, "decoding on from a saved and loaded cache")
    return "equal after a round trip, and decoding goes on from a loaded cache"


def _loaded(s: Subject, module: nn.Module, when: str) -> nn.Module:
    """Return a fresh module with the saved state of `module`. Raise `Broken` where it does not load."""
    with seeded(11):
        fresh = shaken(s.build() if s.build else copy.deepcopy(s.module), seed=11).to(s.dtype).eval()
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    try:
        fresh.load_state_dict(torch.load(file, weights_only=True))
    except Exception as error:
        reason = " ".join(str(error).split())
        raise Broken(f"its state, saved {when}, loads into no fresh module: {reason}") from None
    return fresh
