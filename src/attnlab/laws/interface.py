"""Laws of attnlab's interface: forward(x, positions, cache, mask) -> (y, cache)."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..cache import Cache
from ..documents import PackedRows
from ..errors import UserError
from ..recording import record_attention, record_losses
from ..spec import CAUSAL, CacheSpec, Mask
from .subject import Broken, NotApplicable, Subject, by, finite, movement, plain, same, scale, shaken

BUDGET = 4  # bfloat16 roundings that follow one another: projections, rotation, scores, weights, values, output


def chunks(s: Subject) -> str:
    """Prefill, one token at a time and any chunks between give what one pass gives."""
    for ragged, length in itertools.product((False, True), s.lengths):
        x = s.x(length)
        whole = s(x)
        for splits in _splits(length):
            y, _ = s.feed(x, splits, s.cache(ragged=ragged))
            words = "one token at a time" if max(splits) == 1 else f"in chunks of {', '.join(map(str, splits))}"
            same(y, whole, s.tolerance, f"decoding {length} tokens {words}")
    return f"one pass, one token at a time and uneven chunks agree, up to {s.lengths[-1]} tokens"


def _splits(length: int) -> list[list[int]]:
    if length <= 3:
        return [[1] * length, [length]]
    uneven = [3, 1, 8, 2, 5] * length
    while sum(uneven[:-1]) >= length:
        uneven.pop()
    uneven[-1] -= sum(uneven) - length
    third = length // 3
    return [[length], [1] * length, [length - 1, 1], [1, length - 1], [third, length - third], uneven]


def rewind(s: Subject) -> str:
    """A cache taken back to an earlier token decodes as if later ones had never been; where it cannot, it says so."""
    x, other = s.x(), s.x(seed=4)
    length, back = x.shape[1], x.shape[1] // 2
    for ragged in (False, True):
        _, cache = s.feed(x, [back, length - back], s.cache(ragged=ragged))
        if not s.config.rewinds:
            try:
                cache.rewind(back)
            except UserError as error:
                raise NotApplicable(f"it cannot rewind, and says so: {error}") from None
            raise Broken("the config says that it cannot rewind, yet rewinding the cache is not refused")
        rewound = cache.rewind(back) or cache
        y, _ = s.feed(other[:, back:], [1, length - back - 1], rewound, start=back)
        want = s(torch.cat([x[:, :back], other[:, back:]], 1))[:, back:]
        same(y, want, s.tolerance, f"decoding on after {length} tokens were rewound to {back}")
    return f"{length} tokens rewound to {back} and continued agree with a fresh pass"


def fork(s: Subject) -> str:
    """Writing to a fork of a cache does not change the original, nor the other way round."""
    x, other = s.x(), s.x(seed=4)
    cut, rest = x.shape[1] - 4, [1, 3]
    for ragged in (False, True):
        _, cache = s.feed(x[:, :cut], [cut], s.cache(ragged=ragged))
        branch = cache.fork()
        two, _ = s.feed(other[:, cut:], rest, branch, start=cut)
        one, _ = s.feed(x[:, cut:], rest, cache, start=cut)
        same(one, s(x)[:, cut:], s.tolerance, f"after a fork at {cut} tokens was written to, the original")
        same(two, s(torch.cat([x[:, :cut], other[:, cut:]], 1))[:, cut:], s.tolerance, f"the fork at {cut} tokens")
    return "a fork and its original go on independently"


def left_padding(s: Subject) -> str:
    """Pads on the left change no real output, whatever they hold, with or without a cache, however it is cut."""
    x, positions, lengths = _ragged(s)
    total = x.shape[1]
    alone = [s(x[i : i + 1, total - n :]) for i, n in enumerate(lengths)]
    pad = (positions < 0)[..., None]
    contents = {"zeros": 0.0, "large numbers": 1e3, "not numbers": math.nan}
    for (word, value), splits in itertools.product(contents.items(), ([], [total], [5, total - 5], [1] * total)):
        padded = torch.where(pad, torch.full_like(x, value), x)
        how = "in one pass" if not splits else "one token at a time" if max(splits) == 1 else f"in chunks of {splits}"
        if splits:
            y, _ = s.feed(padded, splits, s.cache(len(x), total), positions)
        else:
            y, _ = s.module(padded, positions)
        for i, n in enumerate(lengths):
            same(
                y[i : i + 1, total - n :], alone[i], s.tolerance, f"{total - n} pads of {word} before {n} tokens, {how}"
            )
    return f"sequences of {', '.join(map(str, lengths))} tokens padded to {total} agree with each alone"


def _ragged(s: Subject) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """x, positions (-1 for a pad) and the real length of each row."""
    total = s.lengths[-1]
    lengths = (total, total - 7, total // 2, 1)
    x = s.x(total, batch=len(lengths))
    column = torch.arange(total).expand(len(lengths), -1)
    positions = column - torch.tensor([total - n for n in lengths])[:, None]
    return x, positions.clamp(min=-1), lengths


def masked_rows(s: Subject) -> str:
    """Pads, which may see nothing, give finite outputs, and finite gradients to the real tokens."""
    x, positions, _ = _ragged(s)
    pad = (positions < 0)[..., None]
    for word, value in {"zeros": 0.0, "ordinary numbers": 1.0, "large numbers": 1e3}.items():
        padded = torch.where(pad, torch.full_like(x, value), x).requires_grad_()
        y, _ = s.module(padded, positions)
        finite(y, f"with pads of {word}")
        (gradient,) = torch.autograd.grad((y * ~pad).sum(), padded)
        finite(gradient, f"with pads of {word}, in the gradient")
    whole_row = torch.full_like(positions, -1)
    y, _ = s.module(x, torch.where(torch.arange(len(x))[:, None] == 1, whole_row, positions))
    finite(y, "with a sequence that is all padding")
    return f"{int(pad.sum())} pads give finite outputs and gradients"


def isolated_documents(s: Subject) -> str:
    """Documents that share a row, taken apart for attention, give what each gives alone; none moves another."""
    total = s.lengths[-1]
    rows = ((total,), (1, 2, total // 2), (total // 3, 5, total - total // 3 - 5))  # lengths; the second has padding
    spans = [(r, sum(n[:i]), sum(n[: i + 1])) for r, n in enumerate(rows) for i in range(len(n))]
    documents = torch.full((len(rows), total), -1)
    for number, (row, start, stop) in enumerate(spans):
        documents[row, start:stop] = number
    packed = PackedRows.of(documents)
    x = s.x(total, batch=len(rows)).masked_fill((documents < 0)[..., None], math.nan)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)

    def run(x: Tensor) -> Tensor:
        with torch.no_grad():
            return packed.unpacked(packed.attend(s.module, packed.packed(x)))

    y = run(x)
    for number, (row, start, stop) in enumerate(spans):
        what = f"document {number}, of length {stop - start}, one of {len(spans)} in {len(rows)} rows"
        same(y[row : row + 1, start:stop], s(x[row : row + 1, start:stop]), s.tolerance, what)
    for number in range(len(spans)):
        own = (documents == number)[..., None]
        moved = torch.where(own, 0, run(torch.where(own, x + 3 * noise, x)) - y)
        if float(moved.abs().max()) > s.tolerance * scale(y):
            other = int(documents[moved.abs().amax(2) == moved.abs().max()][0])
            raise Broken(f"document {other} {by(moved.abs().max())} when document {number} changes")
    lengths = ", ".join(str(stop - start) for _, start, stop in spans)
    return f"documents of {lengths} tokens in {len(rows)} rows agree with each alone, and none moves another"


def cache_size(s: Subject) -> str:
    """The live cache holds exactly what `cache_spec.floats` says, in declared rows, and nothing hides elsewhere."""
    spec, batch = s.config.cache_spec, 2
    for ragged, length in itertools.product((False, True), (1, *s.lengths)):
        before = _hidden(s.module)
        _, cache = s.feed(s.x(length), [length], s.cache(batch, ragged=ragged))
        want, held = batch * spec.floats(length), cache.floats()
        _declared(cache, spec, "")
        counted = sum(_live(memory) for memory in memories(cache))
        for how, floats in (("counted from its tensors", counted), ("by its own count", held)):
            if floats != want:
                raise Broken(
                    f"after {length} tokens the cache holds {floats // batch} floats per sequence, {how}; "
                    f"declared are {want // batch}"
                )
        extra = {name: size for name, size in _hidden(s.module).items() if before.get(name) != size}
        if extra:
            raise Broken(f"the module keeps tensors of its own between calls: {', '.join(extra)}")
    longest = s.lengths[-1]
    return f"{spec.floats(longest)} floats per sequence after {longest} tokens, as declared, at every length tried"


def memories(cache: Cache) -> Iterator[Cache]:
    """The cache and every further memory beside it."""
    yield cache
    for further in cache.beside.values():
        yield from memories(further)


def _live(memory: Cache) -> int:
    """Floats in use, counted from the tensors themselves: rows that hold a token, and the state."""
    rows = int((memory.positions >= 0).sum())
    return rows * sum(math.prod(t.shape[2:]) for t in memory.rows.values()) + sum(
        t.numel() for t in memory.state.values()
    )


def _declared(cache: Cache, spec: CacheSpec, where: str) -> None:
    for kind, have, want in (
        ("rows", {n: tuple(t.shape[2:]) for n, t in cache.rows.items()}, spec.rows),
        ("state", {n: tuple(t.shape[1:]) for n, t in cache.state.items()}, spec.state),
    ):
        for name, shape in have.items():
            if name not in want:
                raise Broken(
                    f"the cache holds {kind} {where}{name} of shape {list(shape)}, which its spec does not declare"
                )
            if shape != tuple(want[name]):
                raise Broken(f"{kind} {where}{name} have shape {list(shape)}; declared is {list(want[name])}")
    for name, further in cache.beside.items():
        if name not in spec.beside:
            raise Broken(f"the cache holds a memory {where}{name}, which its spec does not declare")
        _declared(further, spec.beside[name], f"{where}{name}.")


def _hidden(module: nn.Module) -> dict[str, int]:
    """Tensors that a module holds beside its parameters: name -> number of elements."""
    found: dict[str, int] = {}
    for path, part in module.named_modules():
        for name, value in {
            **vars(part),
            "_parameters": None,
            "_modules": None,
            "_buffers": None,
            **part._buffers,
        }.items():
            size = sum(tensor.numel() for tensor in _tensors(value))
            if size:
                found[f"{path}.{name}".lstrip(".")] = size
    return found


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Cache):
        for memory in memories(value):
            yield from (*memory.rows.values(), *memory.state.values())
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def plain_path(s: Subject) -> str:
    """A call promised to be plainly causal, and a cache promised to be even, give what the general ones give."""
    for length in s.lengths:
        x = s.x(length)
        general, _ = s.module(x, plain(x), None, CAUSAL)
        promised, _ = s.module(x, plain(x), None, Mask(plain=True))
        same(promised, general, s.tolerance, f"promised to be plain, {length} tokens")
    cut = x.shape[1] - 3
    want, _ = s.feed(x, [cut, 1, 2], s.cache(ragged=True))
    cache, start, parts = s.cache(ragged=False), 0, []
    for n in (cut, 1, 2):
        y, cache = s.module(x[:, start : start + n], plain(x)[:, start : start + n], cache, Mask(plain=True))
        parts.append(y)
        start += n
    same(torch.cat(parts, 1), want, s.tolerance, "decoding with an even cache and a plain mask")
    return "plain and general paths agree, with and without a cache"


def held_rows(s: Subject) -> str:
    """A decode step reads only rows that hold something: not-a-number in the unused capacity changes nothing."""
    x = s.x()
    length = x.shape[1]
    cut = length - 5
    whole = s(x)[:, cut:]
    for ragged in (False, True):
        _, cache = s.feed(x[:, :cut], [cut], s.cache(ragged=ragged, max_len=2 * length))
        for memory in memories(cache):
            for rows in memory.rows.values():
                rows[:, memory.held :] = math.nan
        y, _ = s.feed(x[:, cut:], [1, 1, 3], cache, start=cut)
        same(y, whole, s.tolerance, "with the unused capacity full of not-a-number")
    return "the unused capacity is never read"


def own_layers(s: Subject) -> str:
    """Each layer is its own: no parameter is shared, and each layer's parameters act in that layer."""
    assert s.build
    layers = [shaken(s.build(), seed=i).to(s.dtype).eval() for i in range(3)]

    def run(x: Tensor) -> Tensor:
        for layer in layers:
            x = x + layer(x, plain(x))[0]
        return x

    return separate(layers, run, s.x(5))


def separate(layers: Sequence[nn.Module], run: Callable[[Tensor], Tensor], x: Tensor) -> str:
    """The law `own layers` for the layers of any model; `run(x)` is the whole model."""
    owner: dict[int, tuple[int, str]] = {}
    for i, layer in enumerate(layers):
        for name, parameter in layer.named_parameters():
            first, other = owner.setdefault(id(parameter), (i, name))
            if first != i:
                raise Broken(f"layer {i} has no {name} of its own: it is layer {first}'s {other}")
    calls = [0] * len(layers)

    def count(i: int, *_: Any) -> None:
        calls[i] += 1

    hooks = [layer.register_forward_hook(functools.partial(count, i)) for i, layer in enumerate(layers)]
    reference = run(x).detach()
    for hook in hooks:
        hook.remove()
    for i, times in enumerate(calls):
        if times != 1:
            raise Broken(f"layer {i} of {len(layers)} runs {f'{times} times' if times else 'never'} in one pass")
    for i, layer in enumerate(layers):
        state = copy.deepcopy(layer.state_dict())
        shaken(layer, seed=i, share=0.5)
        moved = float(movement(run(x), reference).max())
        layer.load_state_dict(state)
        if moved <= 1e-12 * scale(reference):
            raise Broken(f"changing every parameter of layer {i} changes no output")
    return f"{len(layers)} layers share nothing, and each acts once"


def relative_position(s: Subject) -> str:
    """Shifting all positions by the same number changes nothing."""
    if s.config.rope_theta is None:
        raise NotApplicable("it has no rotary embedding: the model adds learned positions")
    if not s.config.relative:
        raise NotApplicable("its config says that absolute positions matter to it")
    shift = 1234
    for length in s.lengths:
        x = s.x(length)
        y, _ = s.module(x, plain(x) + shift)
        same(y, s(x), 1e3 * s.tolerance, f"with all {length} positions shifted by {shift}")
    return f"all positions shifted by {shift}: nothing changes"


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
            y, _ = compiled(value, plain(x), None, Mask(plain=True))
            (gradient,) = torch.autograd.grad(y.sum(), value)
            (want,) = torch.autograd.grad(s(value, s.fresh().module.train()).sum(), value)
            with torch.no_grad():
                _, cache = s.feed(x[:, :11], [11], s.cache(ragged=False))
                step, _ = torch.compile(s.module, backend="eager", fullgraph=True)(
                    x[:, 11:12], plain(x)[:, 11:12], cache
                )
    except torch._dynamo.exc.TorchDynamoException as error:
        raise Broken(f"torch.compile cannot trace it whole: {str(error).strip().splitlines()[0]}") from None
    finally:
        torch._dynamo.reset()
    same(y, s(x, s.fresh().module.train()), s.tolerance, "compiled")
    same(gradient, want, 10 * s.tolerance, "compiled, in the gradient")
    same(step, s(x)[:, 11:12], s.tolerance, "compiled, one decode step after 11 tokens")
    return "traced whole; outputs, gradients and a decode step are the same"


def bfloat16(s: Subject) -> str:
    """In bfloat16 the error is within the budget: what rounding the input and each of a few stages must cost."""
    x = s.x().bfloat16().to(s.dtype)
    module = s.fresh().module.bfloat16()
    rounded = s.fresh().module.bfloat16().to(s.dtype)
    positions = plain(x) + 1024
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
    batch, length = 2, s.lengths[-1]
    x = s.x(length, batch)
    words = []
    for new in (length, 5, 1) if s.config.cache_spec.keep != 1 else (length, 5):  # one term is no product to a counter
        old = length - new
        cache = None
        with torch.no_grad():
            if old:
                _, cache = module(x[:, :old], plain(x)[:, :old], s.cache(batch, ragged=False))
            with FlopCounterMode(display=False) as counter:
                module(x[:, old:], plain(x)[:, old:], cache)
        counted, declared = counter.get_total_flops(), batch * s.config.flops(new, length)
        if counted != declared:
            raise Broken(
                f"{new} new tokens of {length}: counted {counted // batch} FLOPs per sequence, "
                f"declared {declared // batch}"
            )
        words.append(f"{declared // batch} for {new}")
    return f"counted = declared over {length} tokens: {', '.join(words)}"


def kernels(s: Subject) -> str:
    """Every kernel and every mode gives the reference's outputs and gradients, padded or not, cached or not."""
    modes: dict[str, Mapping[str, Any]] = dict(s.config.modes) or {"": {}}
    x, positions, _ = _ragged(s)
    reference = s.variant(impl="reference")
    want = {**_pass(reference, x, positions), "the decoded output": _decode(s, reference, x)}
    told = []
    for impl, mode in itertools.product(s.config.impls, modes):
        name = " ".join(filter(None, (impl, mode)))
        module = s.variant(impl=impl, **modes[mode])
        try:
            got = _pass(module, x, positions)
        except UserError:  # a kernel may have no gradients on this machine; then its outputs are compared
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that it runs unfused
                got = _pass(module, x, positions)
            name += " (outputs only: it has no gradients here)"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            got["the decoded output"] = _decode(s, module, x)
        if lost := set(want) - set(got) if "only" not in name else ():
            raise Broken(f"{name}: {min(lost)} is not there, though the reference has it")
        for key in got:
            far = float((got[key] - want[key]).abs().nan_to_num(nan=math.inf).max())
            if far > 100 * s.tolerance * max(scale(want[key]), 1e-3):
                raise Broken(f"{name}: {key} differs from the reference by {far:.2g}")
        told.append(name)
    return f"{', '.join(told)}: equal the reference"


def _pass(module: nn.Module, x: Tensor, positions: Tensor) -> dict[str, Tensor]:
    """Outputs and every gradient of a plain pass and of a padded one."""
    found = {}
    for word, where, mask in (("plain", plain(x), Mask(plain=True)), ("padded", positions, CAUSAL)):
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
    length = x.shape[1]
    return dataclasses.replace(s, module=module).feed(x, [length - 6, 1, 5], s.cache(len(x)))[0].detach()


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
        ends = []
        for sign in (1, -1):
            tensor.data.copy_(kept + sign * step * direction)
            y, loss = value()
            ends.append((y.item(), loss))
        tensor.data.copy_(kept)
        numeric, extra = ((above - below) / (2 * step) for above, below in zip(*ends, strict=True))
        analytic = 0.0 if gradient is None else float((gradient * direction).sum())
        if min(abs(numeric - analytic), abs(numeric + extra - analytic)) > 1e-5 * max(1.0, abs(numeric)):
            raise Broken(f"the gradient of {name} is {analytic:.6g}, the difference in its direction {numeric:.6g}")
    return f"{len(inputs)} gradients equal finite differences"


def attention_maps(s: Subject) -> str:
    """Recorded attention is non-negative, sums to 1, and is zero for the future and for pads."""
    x, positions, _ = _ragged(s)
    with record_attention() as maps:
        s.module(x, positions)
    if not maps:
        raise NotApplicable("it records no attention map: it does not attend")
    real = positions >= 0
    future = (positions[:, None, :] > positions[:, :, None]) | ~real[:, None, :]
    for n, weights in enumerate(maps):
        if float(weights.min()) < 0:
            raise Broken(f"map {n} has a negative weight, {float(weights.min()):.2g}")
        total = weights.sum(-1).transpose(1, 2)[real]  # tokens N
        wrong = (total - 1).abs() > 1e-6
        if bool((wrong & (total.abs() > 1e-12)).any()):
            raise Broken(f"a row of map {n} sums to {float(total[wrong][0]):.3g}, not to 1")
        if weights.shape[-1] == x.shape[1]:
            seen = (weights.amax(1) * future * real[:, :, None]).nonzero()
            if len(seen):
                _, query, key = seen[0].tolist()
                raise Broken(f"map {n} lets token {query} see token {key}, which is later or a pad")
    return f"{len(maps)} map{'s' * (len(maps) > 1)} of shape {list(maps[0].shape)}"
