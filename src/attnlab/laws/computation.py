"""Laws of computation: the same results from every kernel, precise, differentiable and counted."""

from __future__ import annotations

import dataclasses
import itertools
import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..recording import record_losses
from ..spec import CAUSAL, Mask
from .subject import Broken, Subject, positions_of, require_equal, scale

BUDGET = 4  # bfloat16 roundings that follow one another: projections, rotation, scores, weights, values, output


def kernels(s: Subject) -> str:
    """Every kernel and every mode gives the reference's outputs and gradients, padded or not, cached or not."""
    modes: dict[str, Mapping[str, Any]] = dict(s.config.modes) or {"": {}}
    x, positions, _ = s.left_padded()
    reference = s.variant(impl="reference")
    want = {**_passes(reference, x, positions), "the decoded output": _decode(s, reference, x)}
    told = []
    for impl, mode in itertools.product(s.config.impls, modes):
        name = " ".join(filter(None, (impl, mode)))
        module = s.variant(impl=impl, **modes[mode])
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
    x = s.x(13)
    module = s.fresh().module
    inputs = {"x": x.clone().requires_grad_(), **{n: p for n, p in module.named_parameters() if p.requires_grad}}
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype)

    def value() -> tuple[Tensor, float]:
        """Return the weighted sum of outputs, and the sum of auxiliary losses."""
        with record_losses() as losses:
            y = s(inputs["x"], module)
        return (y * weight).sum(), sum(float(loss) for values in losses.values() for loss in values)

    found = torch.autograd.grad(value()[0], list(inputs.values()), allow_unused=True)
    generator = torch.Generator().manual_seed(6)
    step = 1e-5
    for (name, tensor), gradient in zip(inputs.items(), found, strict=True):
        direction = torch.randn(tensor.shape, generator=generator, dtype=x.dtype)
        direction /= direction.norm()
        kept = tensor.detach().clone()
        tensor.data.copy_(kept + step * direction)
        y_above, loss_above = value()
        tensor.data.copy_(kept - step * direction)
        y_below, loss_below = value()
        tensor.data.copy_(kept)
        numeric = (y_above.item() - y_below.item()) / (2 * step)
        with_loss = numeric + (loss_above - loss_below) / (2 * step)
        analytic = 0.0 if gradient is None else float((gradient * direction).sum())
        if min(abs(numeric - analytic), abs(with_loss - analytic)) > 1e-5 * max(1.0, abs(numeric)):
            raise Broken(f"the gradient of {name} is {analytic:.6g}, the difference in its direction {numeric:.6g}")
    return f"{len(inputs)} gradients equal finite differences"


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
    x = s.x().bfloat16().to(s.dtype)
    module = s.fresh().module.bfloat16()
    rounded = s.fresh().module.bfloat16().to(s.dtype)
    positions = positions_of(x) + 1024
    with torch.no_grad():
        y, _ = module(x.bfloat16(), positions)
        exact, _ = rounded(x, positions)
    if y.dtype != torch.bfloat16:
        raise Broken(f"for bfloat16 input the output is {y.dtype}")
    size = float(exact.pow(2).mean().sqrt())
    error = float((y.to(s.dtype) - exact).pow(2).mean().sqrt())
    budget = BUDGET * torch.finfo(torch.bfloat16).eps * size
    if not error <= budget:
        raise Broken(f"the error in bfloat16 is {error / size:.2g} of the output; the budget is {budget / size:.2g}")
    return (
        f"error {error / size:.2g} of the output, budget {budget / size:.2g}, at positions from {int(positions[0, 0])}"
    )


def flops(s: Subject) -> str:
    """The counted FLOPs of the reference kernel equal the declared formula: a whole pass, a chunk and one step."""
    from torch.utils.flop_counter import FlopCounterMode

    module = s.variant(impl="reference")
    batch = 2
    length = s.lengths[-1]
    x = s.x(length, batch)
    words = []
    steps = (length, 5) if s.config.cache_spec.keep == 1 else (length, 5, 1)  # a counter sees no product in one term
    for new in steps:
        old = length - new
        cache = None
        with torch.no_grad():
            if old:
                _, cache = module(x[:, :old], positions_of(x)[:, :old], s.cache(batch, ragged=False))
            with FlopCounterMode(display=False) as counter:
                module(x[:, old:], positions_of(x)[:, old:], cache)
        counted = counter.get_total_flops()
        declared = batch * s.config.flops(new, length)
        if counted != declared:
            raise Broken(
                f"{new} new tokens of {length}: counted {counted // batch} FLOPs per sequence, "
                f"declared {declared // batch}"
            )
        words.append(f"{declared // batch} for {new}")
    return f"counted = declared over {length} tokens: {', '.join(words)}"
