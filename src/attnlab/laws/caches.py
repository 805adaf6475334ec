"""Laws of the cache.

Decoding with one gives what a pass without one gives, and it holds exactly what its spec declares.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..cache import Cache
from ..errors import UserError
from ..spec import CacheSpec
from . import foreign_cache
from .state import tensors_in
from .subject import Broken, NotApplicable, Subject, require_equal


def chunks(s: Subject) -> str:
    """Prefill, one token at a time and any chunks between give what one pass gives."""
    for ragged, length in itertools.product(s.raggeds, s.lengths):
        x = s.x(length)
        whole = s(x)
        for splits in _splits(length):
            y, _ = s.feed(x, splits, s.cache(ragged=ragged))
            how = "one token at a time" if max(splits) == 1 else f"in chunks of {', '.join(map(str, splits))}"
            require_equal(y, whole, s.tolerance, f"decoding {length} tokens {how}")
    for length in s.tiles:
        x = s.x(length, batch=1)
        y, _ = s.feed(x, [length - 3, 1, 1, 1], s.cache(1))
        require_equal(y, s(x), s.tolerance, f"decoding 3 tokens after {length - 3}")
    return f"one pass, one token at a time and uneven chunks agree, up to {s.longest} tokens"


def _splits(length: int) -> list[list[int]]:
    """Return several ways to cut `length` tokens into chunks, as the tokens of each chunk."""
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
    x = s.x()
    other = s.x(seed=4)
    length = x.shape[1]
    back = length // 2
    for ragged in s.raggeds:
        _, cache = s.feed(x, [back, length - back], s.cache(ragged=ragged))
        rewound = _rewound(s, cache, back, length)
        y, _ = s.feed(other[:, back:], [1, length - back - 1], rewound, start=back)
        joined = torch.cat([x[:, :back], other[:, back:]], 1)
        want, _ = s.feed(joined, [back, 1, length - back - 1], s.cache(ragged=ragged))
        require_equal(y, want[:, back:], s.tolerance, f"decoding on after {length} tokens were rewound to {back}")
    return f"{length} tokens rewound to {back} and continued agree with a fresh pass"


def _rewound(s: Subject, cache: Any, back: int, length: int) -> Any:
    """Return the cache of `length` tokens taken back to `back`. `NotApplicable` where it cannot, and says so."""
    if s.call is not None:
        return foreign_cache.rewound(cache, back, length)
    if s.config.rewinds:
        return cache.rewind(back) or cache
    try:
        cache.rewind(back)
    except UserError as error:
        raise NotApplicable(f"it cannot rewind, and says so: {error}") from None
    raise Broken("the config says that it cannot rewind, yet rewinding the cache is not refused")


def fork(s: Subject) -> str:
    """Writing to a fork of a cache does not change the original, nor the other way round."""
    x = s.x()
    other = s.x(seed=4)
    cut = x.shape[1] - 4
    rest = [1, 3]
    for ragged in s.raggeds:
        whole, _ = s.feed(x, [cut, *rest], s.cache(ragged=ragged))
        changed, _ = s.feed(torch.cat([x[:, :cut], other[:, cut:]], 1), [cut, *rest], s.cache(ragged=ragged))
        _, cache = s.feed(x[:, :cut], [cut], s.cache(ragged=ragged))
        branch = cache.fork() if s.call is None else copy.deepcopy(cache)
        two, _ = s.feed(other[:, cut:], rest, branch, start=cut)
        one, _ = s.feed(x[:, cut:], rest, cache, start=cut)
        require_equal(one, whole[:, cut:], s.tolerance, f"after a fork at {cut} tokens was written to, the original")
        require_equal(two, changed[:, cut:], s.tolerance, f"the fork at {cut} tokens")
    return "a fork and its original go on independently"


def cache_size(s: Subject) -> str:
    """The live cache holds exactly what `cache_spec.floats` says, in declared rows, and nothing hides elsewhere."""
    if s.call is not None:
        return foreign_cache.floats_held(s)
    spec = s.config.cache_spec
    batch = 2
    for ragged, length in itertools.product((False, True), (1, *s.lengths)):
        before = _hidden(s.module)
        _, cache = s.feed(s.x(length), [length], s.cache(batch, ragged=ragged))
        want = batch * spec.floats(length)
        _require_declared(cache, spec, "")
        counted = sum(_live(memory) for memory in memories(cache))
        for how, floats in (("counted from its tensors", counted), ("by its own count", cache.floats())):
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
    """Yield the cache and every further memory beside it."""
    yield cache
    for further in cache.beside.values():
        yield from memories(further)


def _live(memory: Cache) -> int:
    """Return the floats in use, counted from the tensors themselves: rows that hold a token, and the state."""
    rows = int((memory.positions >= 0).sum())
    per_row = sum(math.prod(t.shape[2:]) for t in memory.rows.values())
    state = sum(t.numel() for t in memory.state.values())
    return rows * per_row + state


def _require_declared(cache: Cache, spec: CacheSpec, where: str) -> None:
    """Raise `Broken` where the cache holds what the spec does not declare. where: names of the memories around it."""
    rows = {name: tuple(t.shape[2:]) for name, t in cache.rows.items()}
    state = {name: tuple(t.shape[1:]) for name, t in cache.state.items()}
    for kind, have, want in (("rows", rows, spec.rows), ("state", state, spec.state)):
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
        _require_declared(further, spec.beside[name], f"{where}{name}.")


def _hidden(module: nn.Module) -> dict[str, int]:
    """Return the tensors that a module holds beside its parameters: name -> number of elements."""
    found: dict[str, int] = {}
    for path, part in module.named_modules():
        attributes = {**vars(part), "_parameters": None, "_modules": None, "_buffers": None}
        for name, value in {**attributes, **part._buffers}.items():
            size = sum(tensor.numel() for tensor in tensors_in(value))
            if size:
                found[f"{path}.{name}".lstrip(".")] = size
    return found


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
        require_equal(y, whole, s.tolerance, "with the unused capacity full of not-a-number")
    return "the unused capacity is never read"
