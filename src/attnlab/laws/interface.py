"""Laws of attnlab's interface, forward(x, positions, cache, mask) -> (y, cache), that need no cache."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..documents import PackedRows
from ..recording import Attended, record_attention, shared
from ..spec import CAUSAL, Mask
from .prepare import shaken
from .subject import (
    Broken,
    NotApplicable,
    Subject,
    movement,
    moves_by,
    positions_of,
    require_equal,
    require_finite,
    scale,
)


def left_padding(s: Subject) -> str:
    """Pads on the left change no real output, whatever they hold, with or without a cache, however it is cut."""
    x, positions, lengths = s.left_padded()
    total = x.shape[1]
    alone = [s(x[i : i + 1, total - n :]) for i, n in enumerate(lengths)]
    pad = (positions < 0)[..., None]
    contents = {"zeros": 0.0, "large numbers": 1e3, "not numbers": math.nan}
    cuts = {
        "in one pass": [],
        f"in chunks of {[total]}": [total],
        f"in chunks of {[5, total - 5]}": [5, total - 5],
        "one token at a time": [1] * total,
    }
    for (word, value), (how, splits) in itertools.product(contents.items(), cuts.items()):
        padded = torch.where(pad, torch.full_like(x, value), x)
        if splits:
            y, _ = s.feed(padded, splits, s.cache(len(x), total), positions)
        else:
            y, _ = s.module(padded, positions)
        for i, n in enumerate(lengths):
            what = f"{total - n} pads of {word} before {n} tokens, {how}"
            require_equal(y[i : i + 1, total - n :], alone[i], s.tolerance, what)
    return f"sequences of {', '.join(map(str, lengths))} tokens padded to {total} agree with each alone"


def pads_anywhere(s: Subject) -> str:
    """A sequence that pauses while others go on gives each token what it gives alone, whatever its pads hold."""
    total = s.lengths[-1]
    x = s.x(total, batch=3)
    column = torch.arange(total)
    real = torch.stack(
        [
            column >= 0,
            (column % 7 != 3) & ((column < total // 3) | (column >= total // 3 + 9)),  # pauses of 1 and of 9 tokens
            (column >= 2) & (column % 5 < 3) & (column < total - 4),  # pads at both ends too
        ]
    )
    positions = torch.where(real, real.cumsum(1) - 1, -1)
    alone = [s(x[i : i + 1, real[i]]) for i in range(len(x))]
    cuts = {
        "in one pass": [],
        f"in chunks of {[11, 1, total - 12]}": [11, 1, total - 12],
        "one token at a time": [1] * total,
    }
    for (word, value), (how, splits) in itertools.product(
        {"not numbers": math.nan, "numbers": 10.0}.items(), cuts.items()
    ):
        padded = torch.where(real[..., None], x, value * x.abs().clamp(min=0.1))
        if splits:
            y, _ = s.feed(padded, splits, s.cache(len(x), total), positions)
        else:
            y, _ = s.module(padded, positions)
        for i, want in enumerate(alone):
            what = f"sequence {i} with {int((~real[i]).sum())} pads of {word} between its tokens, {how}"
            require_equal(y[i : i + 1, real[i]], want, s.tolerance, what)
    pauses = ", ".join(map(str, (~real).sum(1).tolist()))
    return f"sequences that pause for {pauses} of {total} tokens agree with each alone"


def masked_rows(s: Subject) -> str:
    """Pads, which may see nothing, give finite outputs, and finite gradients to the real tokens."""
    x, positions, _ = s.left_padded()
    pad = (positions < 0)[..., None]
    for word, value in {"zeros": 0.0, "ordinary numbers": 1.0, "large numbers": 1e3}.items():
        padded = torch.where(pad, torch.full_like(x, value), x).requires_grad_()
        y, _ = s.module(padded, positions)
        require_finite(y, f"with pads of {word}")
        (gradient,) = torch.autograd.grad((y * ~pad).sum(), padded)
        require_finite(gradient, f"with pads of {word}, in the gradient")
    second_all_pads = positions.clone()
    second_all_pads[1] = -1
    y, _ = s.module(x, second_all_pads)
    require_finite(y, "with a sequence that is all padding")
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
        require_equal(y[row : row + 1, start:stop], s(x[row : row + 1, start:stop]), s.tolerance, what)
    for number in range(len(spans)):
        own = (documents == number)[..., None]
        moved = torch.where(own, 0, run(torch.where(own, x + 3 * noise, x)) - y)
        if float(moved.abs().max()) > s.tolerance * scale(y):
            other = int(documents[moved.abs().amax(2) == moved.abs().max()][0])
            raise Broken(f"document {other} {moves_by(moved.abs().max())} when document {number} changes")
    lengths = ", ".join(str(stop - start) for _, start, stop in spans)
    return f"documents of {lengths} tokens in {len(rows)} rows agree with each alone, and none moves another"


def plain_path(s: Subject) -> str:
    """A call promised to be plainly causal, and a cache promised to be even, give what the general ones give."""
    for length in s.lengths:
        x = s.x(length)
        general, _ = s.module(x, positions_of(x), None, CAUSAL)
        promised, _ = s.module(x, positions_of(x), None, Mask(plain=True))
        require_equal(promised, general, s.tolerance, f"promised to be plain, {length} tokens")
    cut = x.shape[1] - 3
    want, _ = s.feed(x, [cut, 1, 2], s.cache(ragged=True))
    cache = s.cache(ragged=False)
    parts = []
    for chunk, positions in zip(x.split([cut, 1, 2], 1), positions_of(x).split([cut, 1, 2], 1), strict=True):
        y, cache = s.module(chunk, positions, cache, Mask(plain=True))
        parts.append(y)
    require_equal(torch.cat(parts, 1), want, s.tolerance, "decoding with an even cache and a plain mask")
    return "plain and general paths agree, with and without a cache"


def own_layers(s: Subject) -> str:
    """Each layer is its own: no parameter is shared, and each layer's parameters act in that layer."""
    assert s.build
    layers = [shaken(s.build(), seed=i).to(s.dtype).eval() for i in range(3)]

    def run(x: Tensor) -> Tensor:
        for layer in layers:
            x = x + layer(x, positions_of(x))[0]
        return x

    return separate(layers, run, s.x(5))


def separate(layers: Sequence[nn.Module], run: Callable[[Tensor], Tensor], x: Tensor) -> str:
    """Put the law `own layers` to the layers of any model; `run(x)` is the whole model. Return the evidence."""
    _require_own_parameters(layers)
    reference = _require_one_call_each(layers, run, x)
    for i, layer in enumerate(layers):
        state = copy.deepcopy(layer.state_dict())
        shaken(layer, seed=i, share=0.5)
        moved = float(movement(run(x), reference).max())
        layer.load_state_dict(state)
        if moved <= 1e-12 * scale(reference):
            raise Broken(f"changing every parameter of layer {i} changes no output")
    return f"{len(layers)} layers share nothing, and each acts once"


def _require_own_parameters(layers: Sequence[nn.Module]) -> None:
    owner: dict[int, tuple[int, str]] = {}
    for i, layer in enumerate(layers):
        for name, parameter in layer.named_parameters():
            first, other = owner.setdefault(id(parameter), (i, name))
            if first != i:
                raise Broken(f"layer {i} has no {name} of its own: it is layer {first}'s {other}")


def _require_one_call_each(layers: Sequence[nn.Module], run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return `run(x)`. Raise `Broken` where a layer is not called exactly once."""
    calls = [0] * len(layers)

    def count(i: int, *_: Any) -> None:
        calls[i] += 1

    hooks = [layer.register_forward_hook(functools.partial(count, i)) for i, layer in enumerate(layers)]
    y = run(x).detach()
    for hook in hooks:
        hook.remove()
    for i, times in enumerate(calls):
        if times != 1:
            raise Broken(f"layer {i} of {len(layers)} runs {f'{times} times' if times else 'never'} in one pass")
    return y


def relative_position(s: Subject) -> str:
    """Shifting all positions by the same number changes nothing."""
    if s.config.rope_theta is None:
        raise NotApplicable("it has no rotary embedding: the model adds learned positions")
    if not s.config.relative:
        raise NotApplicable("its config says that absolute positions matter to it")
    shift = 1234
    for length in s.lengths:
        x = s.x(length)
        y, _ = s.module(x, positions_of(x) + shift)
        require_equal(y, s(x), 1e3 * s.tolerance, f"with all {length} positions shifted by {shift}")
    return f"all positions shifted by {shift}: nothing changes"


def attention_maps(s: Subject) -> str:
    """Recorded attention times the values is the answer; rows are shares of 1, and zero for later tokens and pads.

    They sum to 1 or to what a rest leaves, also added up over a layer, and are not negative unless that is declared.
    """
    x, positions, _ = s.left_padded()
    ends: list[int] = []  # the maps there are after each layer
    with record_attention() as maps:
        hooks = [layer.register_forward_hook(lambda *_: ends.append(len(maps))) for layer in s.layers]
        s.module(x, positions)
    for hook in hooks:
        hook.remove()
    if not maps:
        raise NotApplicable("it records no attention map")
    real = positions >= 0
    future = (positions[:, None, :] > positions[:, :, None]) | ~real[:, None, :]
    for n, (weights, call) in enumerate(zip(maps, maps.calls, strict=True)):
        _require_rows(weights, call, real, f"map {n}", signed=s.config.signed)
        if weights.shape[-1] == x.shape[1]:
            seen = (weights.abs().amax(1) * future * real[:, :, None]).nonzero()
            if len(seen):
                _, query, key = seen[0].tolist()
                raise Broken(f"map {n} lets token {query} see token {key}, which is later or a pad")
        values = call.values.repeat_interleave(weights.shape[1] // call.values.shape[2], 2)
        told = torch.einsum("bnls,bsnv->blnv", weights, values.to(weights.dtype))
        require_equal(told[real], call.answer[real], s.tolerance, f"map {n} times its values")
    for begin, end in itertools.pairwise([0, *ends]):
        totals = [shared(maps[n], maps.calls[n]).sum(-1).transpose(1, 2)[real] for n in range(begin, end)]
        most = float(torch.stack(totals).sum(0).max()) if totals else 0.0
        if most > 1 + 1e-6 and not s.config.signed:
            raise Broken(
                f"a row of the layer sums to {most:.3g} over its {end - begin} maps: give each call of attend its "
                "share, and where these have signs, declare signed"
            )
    return f"{len(maps)} map{'s' * (len(maps) > 1)} of shape {list(maps[0].shape)}, times their values the answers"


def _require_rows(weights: Tensor, call: Attended, real: Tensor, what: str, *, signed: bool) -> None:
    """Raise `Broken` where weights (B N L S) of `real` queries (B L) are no shares of one."""
    if signed:
        return
    if float(weights.min()) < 0:
        raise Broken(f"{what} has a negative weight, {float(weights.min()):.2g}")
    total = weights.sum(-1).transpose(1, 2)[real]  # tokens N
    wrong = (total > 1 + 1e-6) if call.rest else ((total - 1).abs() > 1e-6) & (total.abs() > 1e-12)
    if bool(wrong.any()):
        limit = "more than 1" if call.rest else "not to 1"
        raise Broken(f"a row of {what} sums to {float(total[wrong][0]):.3g}, {limit}")


def given_rows(s: Subject) -> str:
    """A layer gives later ones what its Config declares, row by row, and a layer that takes rows reads them all."""
    configs: list[Any] = [layer.config for layer in s.layers]
    if not any(config.gives or config.takes for config in configs):
        raise NotApplicable("its layers give nothing to later ones")
    x = s.x(s.short)
    mask = CAUSAL
    read = set()
    for layer, config in zip(s.layers, configs, strict=True):
        mask = mask.handed()
        y, _ = layer(x, positions_of(x), None, mask)
        found = {name: tuple(tensor.shape) for name, tensor in (mask.gifts or {}).items()}
        wanted = {name: (*x.shape[:2], *shape) for name, shape in config.gives.items()}
        if found != wanted:
            raise Broken(f"a layer gives {_shapes(found)}, and its Config declares {_shapes(wanted)}")
        for name in config.takes:
            tensor = mask.given[name]
            other = tensor.roll(1, 1) if tensor.is_floating_point() else tensor + 1
            changed = {**mask.given, name: other}
            moved, _ = layer(x, positions_of(x), None, dataclasses.replace(mask, given=changed, gifts={}))
            if not float(movement(moved, y).max()) > s.tolerance * scale(y):
                raise Broken(f"a layer declares that it takes {name}, and changing it changes nothing")
            read.add(name)
    return f"given as declared: {', '.join(wanted or mask.given)}; taken and read: {', '.join(sorted(read)) or 'none'}"


def _shapes(tensors: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in sorted(tensors.items())) or "nothing"
