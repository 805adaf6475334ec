"""Laws of computation: the same results from every kernel, precise, differentiable and counted."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..recording import record_losses
from ..spec import CAUSAL, Mask
from .causality import training
from .counting import counted_products
from .state import duplicate, unchanged
from .subject import Broken, NotApplicable, Subject, positions_of, require_equal, scale

Value = Callable[[], tuple[Tensor, float]]  # returns a sum of outputs, and an auxiliary loss
FAR = 1024  # the first position at which bfloat16 is tried, where a call can say positions
STAGES = 8  # roundings of a module of unknown stages, each as bad as that of its input and parameters
BUDGET = 4  # bfloat16 roundings that follow one another: projections, rotation, scores, weights, values, output


def kernels(s: Subject) -> str:
    """Every kernel and every mode gives the reference's outputs and gradients, padded or not, cached or not."""
    modes: dict[str, Mapping[str, Any]] = dict(s.config.modes) or {"": {}}
    x, positions, _ = s.left_padded()
    reference = s.variant(impl="reference")
    want = {**_passes(reference, x, positions), "the decoded output": _decode(s, reference, x)}
    told = []
    for impl, mode in itertools.product(s.config.impls or ("reference",), modes):
        name = " ".join(filter(None, (impl, mode)))
        module = s.variant(impl=impl, **modes[mode])
        refused = _refused(module, x)
        if refused:
            told.append(f"{name} (not here: {refused})")
            continue
        outputs_only = False
        try:
            got = _passes(module, x, positions)
        except UserError:  # a kernel may have no gradients on this machine; then its outputs are compared
            outputs_only = True
            name += " (outputs only: it has no gradients here)"
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that it runs unfused
                got = _passes(module, x, positions)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            got["the decoded output"] = _decode(s, module, x)
        lost = set(want) - set(got)
        if lost and not outputs_only:
            raise Broken(f"{name}: {min(lost)} is not there, though the reference has it")
        for key in got:
            far = float((got[key] - want[key]).abs().nan_to_num(nan=math.inf).max())
            if far > 100 * s.tolerance * max(scale(want[key]), 1e-3):
                raise Broken(f"{name}: {key} differs from the reference by {far:.2g}")
        told.append(name)
    return f"{', '.join(told)}: equal the reference"


def _refused(module: nn.Module, x: Tensor) -> str:
    """Return the sentence by which a kernel refuses this machine altogether; empty where it runs."""
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it runs unfused
            module(x[:1, :2], positions_of(x[:1, :2]))
    except UserError as error:
        return str(error)
    return ""


def _passes(module: nn.Module, x: Tensor, positions: Tensor) -> dict[str, Tensor]:
    """Return outputs and every gradient of a plain pass and of a padded one."""
    found = {}
    for word, where, mask in (("plain", positions_of(x), Mask(plain=True)), ("padded", positions, CAUSAL)):
        value = x.clone().requires_grad_()
        real = (where >= 0)[..., None]
        y, _ = module(value, where, None, mask)
        found[f"the {word} output"] = (y * real).detach()
        if not y.requires_grad:
            continue
        weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=y.dtype)
        inputs = {"x": value, **{name: p for name, p in module.named_parameters() if p.requires_grad}}
        gradients = torch.autograd.grad((y * weight * real).sum(), list(inputs.values()), allow_unused=True)
        for name, gradient in zip(inputs, gradients, strict=True):
            if gradient is not None:
                found[f"the {word} gradient of {name}"] = gradient
    return found


def _decode(s: Subject, module: nn.Module, x: Tensor) -> Tensor:
    """Return y [B T D] of `module`, decoded in three chunks."""
    y, _ = dataclasses.replace(s, module=module).feed(x, [x.shape[1] - 6, 1, 5], s.cache(len(x)))
    return y.detach()


def gradients(s: Subject) -> str:
    """Gradients equal finite differences, in random directions of the input and of every parameter.

    Where an auxiliary loss is attached, a gradient may be that of the output or that of the output and the loss: what
    the loss is made from is partly detached.
    """
    s.require_gradients()
    lengths = (s.short,) if s.call is None else (s.short, s.lengths[-1])
    for length in lengths:
        count = _compare_gradients(s, s.fresh().module, s.x(length), f"for {length} tokens, ")
    for module, when in training(s):
        if _keeps_its_state(s, module):
            _compare_gradients(s, module, s.x(s.short), when)
    return f"{count} gradients equal finite differences"


def _keeps_its_state(s: Subject, module: nn.Module) -> bool:
    """Return whether a call leaves buffers as they are: outputs of a module that adapts are not its gradients'."""
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    with torch.no_grad(), unchanged(module):
        s.answer(module, s.x(s.short))
        after = dict(module.named_buffers())
        return all(name in before and torch.equal(before[name], buffer) for name, buffer in after.items())


def _compare_gradients(s: Subject, module: nn.Module, x: Tensor, when: str) -> int:
    """Return how many gradients equal finite differences. Raise `Broken` where one does not."""
    inputs = {"x": x.clone().requires_grad_(), **{n: p for n, p in module.named_parameters() if p.requires_grad}}
    y = s(inputs["x"], module)
    if not y.requires_grad:
        raise Broken(f"{when}the output has no gradient at all: it was computed without one")
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=y.dtype)

    def value() -> tuple[Tensor, float]:
        """Return the weighted sum of outputs, and the sum of auxiliary losses."""
        with record_losses() as losses:
            y = s(inputs["x"], module)
        return (y * weight).sum(), sum(float(loss) for values in losses.values() for loss in values)

    found = torch.autograd.grad(value()[0], list(inputs.values()), allow_unused=True)
    for (name, tensor), gradient in zip(inputs.items(), found, strict=True):
        slope = Slope(value, tensor, torch.zeros_like(tensor) if gradient is None else gradient)
        gap = slope.gap()
        if gap is not None:
            _require_no_surrogate(value, dict(zip(inputs, found, strict=True)), module)
            told = f"is {gap[0]:.6g}, the difference in its direction {gap[1]:.6g}"
            raise Broken(f"{when}the gradient of {name} {told}")
    return len(inputs)


def _require_no_surrogate(value: Value, gradients: Mapping[str, Tensor | None], module: nn.Module) -> None:
    """Raise `NotApplicable` where a gradient stands in for one that is zero, as where codes are chosen.

    The output is then constant around a number of a parameter, jumps further away, and the number gets a gradient.
    """
    for name, parameter in module.named_parameters():
        gradient = gradients.get(name)
        if gradient is None or gradient.ndim < 2:
            continue
        for row, column in enumerate(gradient.flatten(1).abs().argmax(1).tolist()):
            if abs(float(gradient.flatten(1)[row, column])) < 1e-6:
                continue
            number = torch.zeros_like(parameter)
            number.view(len(number), -1)[row, column] = 1
            slope = Slope(value, parameter, gradient)
            if slope.differences(number, 1e-5)[0] == 0 and slope.differences(number, 3.0)[0] != 0:
                raise NotApplicable(
                    f"outputs jump as {name} changes (row {row}), and its gradient stands in for none: "
                    "differences cannot be compared with it"
                )


@dataclasses.dataclass(frozen=True)
class Slope:
    """The slope of a function of one tensor, by its gradient and by differences."""

    value: Value  # the function, and a loss whose slope the gradient may contain
    tensor: Tensor
    gradient: Tensor

    def gap(self) -> tuple[float, float] | None:
        """Return (slope by the gradient, by differences) where they differ in each of three random directions.

        A wrong gradient is wrong in every direction, noise is not.
        """
        found = None
        for seed in (6, 7, 8):
            found = self._gap(seed)
            if found is None:
                return None
        return found

    def _gap(self, seed: int) -> tuple[float, float] | None:
        """Return (slope by the gradient, by differences) in a random direction; None where they agree.

        A module that computes parts in a lower precision has noise, which differences of several widths tell apart from
        a gap.
        """
        generator = torch.Generator().manual_seed(seed)
        direction = torch.randn(self.tensor.shape, generator=generator, dtype=self.tensor.dtype)
        direction /= direction.norm()
        analytic = float((self.gradient * direction).sum())
        numeric = self.differences(direction, 1e-5)
        if _closest(analytic, numeric) <= 1e-5 * max(1e-2, abs(numeric[0])):
            return None
        best = None
        for width in (1e-5, 1e-4, 1e-3, 1e-2):
            numeric, twice, further = (self.differences(direction, factor * width) for factor in (1, 2, 4))
            noise = max(abs(numeric[0] - other[0]) for other in (twice, further))
            if best is None or noise < best[0]:
                best = (noise, numeric)
        assert best
        noise, numeric = best
        return None if _closest(analytic, numeric) <= 5 * noise + 1e-5 * abs(numeric[0]) else (analytic, numeric[0])

    def differences(self, direction: Tensor, width: float) -> tuple[float, float]:
        """Return the slope by differences of the output, and of the output with the loss."""
        kept = self.tensor.detach().clone()
        sides = []
        for sign in (1, -1):
            self.tensor.data.copy_(kept + sign * width * direction)
            y, loss = self.value()
            sides.append((y.item(), y.item() + loss))
        self.tensor.data.copy_(kept)
        return (sides[0][0] - sides[1][0]) / (2 * width), (sides[0][1] - sides[1][1]) / (2 * width)


def _closest(analytic: float, numeric: tuple[float, float]) -> float:
    return min(abs(slope - analytic) for slope in numeric)


def compiles(s: Subject) -> str:
    """torch.compile traces it whole and gives the same, forward and backward, without a cache and with one."""
    import torch._dynamo

    x = s.x(13)
    torch._dynamo.reset()
    try:
        training = s.fresh().module.train()
        compiled = torch.compile(training, backend="aot_eager", fullgraph=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = x.clone().requires_grad_()
            y, _ = compiled(value, positions_of(x), None, Mask(plain=True))
            (gradient,) = torch.autograd.grad(y.sum(), value)
            (want,) = torch.autograd.grad(s(value, s.fresh().module.train()).sum(), value)
            with torch.no_grad():
                _, cache = s.feed(x[:, :11], [11], s.cache(ragged=False))
                step, _ = torch.compile(s.module, backend="eager", fullgraph=True)(
                    x[:, 11:12], positions_of(x)[:, 11:12], cache
                )
    except torch._dynamo.exc.TorchDynamoException as error:
        raise Broken(f"torch.compile cannot trace it whole: {str(error).strip().splitlines()[0]}") from None
    finally:
        torch._dynamo.reset()
    require_equal(y, s(x, s.fresh().module.train()), s.tolerance, "compiled")
    require_equal(gradient, want, 10 * s.tolerance, "compiled, in the gradient")
    require_equal(step, s(x)[:, 11:12], s.tolerance, "compiled, one decode step after 11 tokens")
    return "traced whole; outputs, gradients and a decode step are the same"


def bfloat16(s: Subject) -> str:
    """In bfloat16 the error is within the budget: what rounding the input and each of a few stages must cost."""
    x = s.x() if s.call is None else 4 * s.x(_precise_length(s), batch=1)  # larger: attention is not a plain mean
    x = x.bfloat16().to(s.dtype)
    rounded = s.fresh().module
    with torch.no_grad():
        for parameter in rounded.parameters():  # not buffers: a table of angles that is rounded is an error
            parameter.copy_(parameter.bfloat16())
    told = []
    budget = None
    for words, y, exact in _in_bfloat16(s, x, rounded):
        size = _rms(exact)
        error = _rms(y.to(s.dtype) - exact)
        if budget is None:
            budget = max(BUDGET * torch.finfo(torch.bfloat16).eps * size, STAGES * _sensitivity(s, x, rounded, exact))
        if not error <= budget:
            raise Broken(f"the error {words} is {error / size:.2g} of the output; the budget is {budget / size:.2g}")
        told.append(f"{error / size:.2g} of the output {words} (budget {budget / size:.2g})")
    if not told:
        raise NotApplicable("it runs neither in bfloat16 nor under autocast")
    begin = f", at positions from {FAR}" if s.call is None else f", over {x.shape[1]} tokens"
    return f"error {', '.join(told)}{begin}"


def _sensitivity(s: Subject, x: Tensor, rounded: nn.Module, exact: Tensor) -> float:
    """Return how far the output moves when the input and each parameter move by what bfloat16 rounds off.

    0 for attnlab's own mechanisms, whose budget is fixed.
    """
    if s.call is None:
        return 0.0
    worst = 0.0
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        moved = s.fresh().module
        with torch.no_grad():
            for new, old in zip(moved.parameters(), rounded.parameters(), strict=True):
                new.copy_(_as_if_rounded(old, generator))
            worst = max(worst, _rms(s(_as_if_rounded(x, generator), moved) - exact))
    return worst


def _as_if_rounded(t: Tensor, generator: torch.Generator) -> Tensor:
    noise = 2 * torch.rand(t.shape, generator=generator, dtype=t.dtype) - 1
    return t * (1 + torch.finfo(torch.bfloat16).eps / 2 * noise)


def _rms(t: Tensor) -> float:
    return float(t.pow(2).mean().sqrt())


def _precise_length(s: Subject) -> int:
    """Return the length at which rounding is looked at: far enough for angles of positions in bfloat16 to be wrong."""
    return max([n for n in s.tiles if n <= 513], default=s.lengths[-1])


def _in_bfloat16(s: Subject, x: Tensor, rounded: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield (words, y in bfloat16, y in full precision) of each way to compute in bfloat16 that runs."""
    module = s.fresh().module.bfloat16()
    if s.call is None:
        positions = positions_of(x) + FAR
        with torch.no_grad():
            y, _ = module(x.bfloat16(), positions)
            exact, _ = rounded(x, positions)
        if y.dtype != torch.bfloat16:
            raise Broken(f"for bfloat16 input the output is {y.dtype}")
        yield "in bfloat16", y, exact
        return
    with torch.no_grad():
        exact = s(x, rounded)
        for words, value, other, context in (
            ("in bfloat16", x.bfloat16(), module, contextlib.nullcontext()),
            ("under autocast", x.float(), duplicate(rounded, None).float(), torch.autocast("cpu", torch.bfloat16)),
        ):
            try:
                with context:
                    y = s(value, other)
            except Exception:  # not every module is made for it
                continue
            yield words, y, exact


def flops(s: Subject) -> str:
    """The counted FLOPs of the reference kernel equal the declared formula: a whole pass, a chunk and one step."""
    module = s.variant(impl="reference")
    batch = 2
    length = s.lengths[-1]
    x = s.x(length, batch)
    words = []
    for new in (length, 5, 1):
        old = length - new
        cache = None
        with torch.no_grad():
            if old:
                _, cache = module(x[:, :old], positions_of(x)[:, :old], s.cache(batch, ragged=False))
            counted = counted_products(functools.partial(module, x[:, old:], positions_of(x)[:, old:], cache))
        declared = batch * s.config.flops(new, length)
        if counted != declared:
            raise Broken(
                f"{new} new tokens of {length}: counted {counted // batch} FLOPs per sequence, "
                f"declared {declared // batch}"
            )
        words.append(f"{declared // batch} for {new}")
    return f"counted = declared over {length} tokens: {', '.join(words)}"
