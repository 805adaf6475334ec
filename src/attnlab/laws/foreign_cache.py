"""Caches of somebody else's module, of whatever kind: taken back to an earlier token, and counted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .call import one_line
from .state import tensors_in
from .subject import Broken, NotApplicable, Subject


def rewound(cache: Any, back: int, length: int) -> Any:
    """Return the cache of `length` tokens as it was after `back`. `NotApplicable` where it cannot be taken back."""
    if hasattr(cache, "crop"):
        return _cropped(cache, back, length)
    if isinstance(cache, nn.Module):
        return cache  # the cache is in the module: the next step says from which token it goes on
    return _cut(cache, back, length)


def _cropped(cache: Any, back: int, length: int) -> Any:
    """Return a cache of transformers cropped to `back` tokens; some releases want to be told how many to remove."""
    why = ""
    for tokens in (back, back - length):
        try:
            cache.crop(tokens)
            if cache.get_seq_length() == back:
                return cache
        except Exception as error:
            why = why or one_line(error)
    raise NotApplicable(f"its cache cannot be cropped: {why or 'crop keeps another number of tokens'}")


def _cut(value: Any, back: int, length: int) -> Any:
    """Return tensors cut to `back` along the axis that is `length` long, in the same containers."""
    if isinstance(value, Tensor):
        axes = [axis for axis, size in enumerate(value.shape) if size == length]
        if len(axes) == 1:
            return value.narrow(axes[0], 0, back)
        raise NotApplicable(f"its cache holds a state of shape {list(value.shape)}, which cannot be taken back")
    if isinstance(value, Mapping):
        return {key: _cut(item, back, length) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_cut(item, back, length) for item in value)
    if value is None:
        return None
    raise NotApplicable(f"its cache, a {type(value).__name__}, has no way to be taken back")


def floats_held(s: Subject) -> str:
    """Return how many floats a sequence needs. Raise `Broken` where that grows faster than its tokens."""
    lengths = (1, *s.lengths)
    floats = {length: _held(s, length, batch=2) / 2 for length in lengths}
    longest = s.lengths[-1]
    shorter = [length for length in lengths if 4 <= length < longest] or [longest]
    most = max(floats[length] / length for length in shorter)
    if floats[longest] / longest > 1.5 * most:
        raise Broken(
            f"the cache grows faster than the sequence: {most:g} floats a token after {shorter[-1]} tokens, "
            f"{floats[longest] / longest:g} after {longest}"
        )
    alone = _kept_in_module(s, 2)
    if _kept_in_module(s, 4) > alone and floats[longest] == 0:
        raise Broken("the module keeps tensors of its own that grow with the batch, and returns no cache")
    return f"{floats[longest]:g} floats per sequence after {longest} tokens, {floats[longest] / longest:g} a token"


def _held(s: Subject, length: int, batch: int) -> int:
    """Return the numbers that the cache of `batch` sequences holds; those that are expanded from one count once."""
    _, cache = s.fresh().feed(s.x(length, batch), [length], s.cache(batch))
    held = tensors_in(cache) if not isinstance(cache, nn.Module) else _beside_parameters(cache)
    return sum(_numbers(tensor) for tensor in held)


def _kept_in_module(s: Subject, batch: int) -> int:
    """Return the numbers that the module itself holds, beside its parameters, after a step."""
    fresh = s.fresh()
    fresh.feed(s.x(s.lengths[-1], batch), [s.lengths[-1]], s.cache(batch))
    return sum(_numbers(tensor) for tensor in _beside_parameters(fresh.module))


def _beside_parameters(module: nn.Module) -> list[Tensor]:
    return [t for t in tensors_in(module) if not isinstance(t, nn.Parameter)]


def _numbers(tensor: Tensor) -> int:
    """Return how many numbers of a tensor lie in memory."""
    count = 1
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= length if stride else 1
    return count
