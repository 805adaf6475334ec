"""A module prepared for the laws: copied, its parameters shaken, and asked what it can be called with."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from ..errors import UserError
from ..spec import AttentionConfig, CacheSpec
from .call import Caller, found_step, is_sequence_first, one_line
from .state import duplicate
from .subject import LENGTHS, ModuleCall, StepCall, Subject

LONGEST = 131  # tokens; for modules whose chunks and windows are not known: longer than most
TILES = (63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 512, 513, 1023, 1024, 1025)  # tokens; around kernels' tiles
BEYOND = 4097  # tokens; a context up to this size is tried just beyond its end
SECONDS = 0.5  # a length whose call takes longer than this is the last one

WIDTHS = (
    *("d_model", "embed_dim", "hidden_size", "n_embd", "dim", "model_dim", "emb_dim", "embed_size", "embedding_dim"),
    *("embed_dims", "dim_model", "emb_size", "hidden_dim", "d_in", "in_features", "input_dim", "width", "channels"),
)
PRECISIONS = {torch.float64: 1e-6, torch.float32: 1e-4}  # with tolerances: others' modules compute parts in float32
CONTEXTS = ("block_size", "context_length", "max_seq_len", "seq_len", "n_ctx", "n_positions", "max_position_embeddings")


def subject(
    module: nn.Module,
    *,
    name: str,
    d_model: int | None = None,
    call: ModuleCall | None = None,
    step: StepCall | None = None,
    build: Callable[[], nn.Module] | None = None,
    seed: int = 0,
) -> Subject:
    """Prepare a copy of `module` for the laws: evaluation mode, parameters shaken, the best precision it runs in.

    d_model: width of its input; None: its attributes tell. call: None: attnlab's interface, or else module(x). step:
    None: found out where forward's parameters tell. build: makes a fresh module of the same shape; None: the module is
    copied. UserError where the width is unknown or the module cannot be called.
    """
    module = shaken(duplicate(module, build), seed).eval()
    if call is None and has_interface(module):
        config: AttentionConfig = module.config  # type: ignore[assignment]
        longest = max(spec.every * (spec.keep or 1) for spec in specs(config.cache_spec))
        lengths = LENGTHS if 3 * longest < LENGTHS[-1] else (*LENGTHS, 3 * longest + 2)
        build = build or (lambda: type(module)(config))
        return Subject(name, module.double(), config.d_model, build=build, lengths=lengths)
    width = d_model or find_number(module, WIDTHS)
    if width is None:
        raise UserError(
            f"the width of {name}'s input is not among its attributes: give d_model, the size of x's last axis"
        )
    call = call or _plain_call(module, width)
    why = ""
    for dtype, tolerance in PRECISIONS.items():
        s = Subject(name, module.to(dtype), width, call, build, dtype=dtype, tolerance=tolerance, step=step)
        for attempt in (s, dataclasses.replace(s, no_gradients="tried")):
            found, refused = accepted(attempt)
            why = why or refused
            if found:
                s = dataclasses.replace(s, lengths=found, no_gradients=_without_gradients(s, found))
                s = dataclasses.replace(s, tiles=_affordable(s))
                return dataclasses.replace(s, step=step or _found_step(s))
    raise UserError(f"{name} cannot be called on x of shape [2, T, {width}]: {why}")


def _plain_call(module: nn.Module, width: int) -> Caller:
    """Return `module(x)`, with the sequence on the first axis where the module takes it so."""
    plain = Caller()
    dtype = next((p.dtype for p in module.parameters()), torch.float32)
    x = torch.randn(2, 5, width, dtype=dtype)
    with contextlib.suppress(Exception):
        turned = is_sequence_first(plain, module, x)
        return dataclasses.replace(plain, sequence_first=bool(turned))
    return plain


def _without_gradients(s: Subject, lengths: Sequence[int]) -> str:
    """Return why the module has no gradients here; empty where it has, or where its output never asks for any."""
    x = s.x(lengths[-1]).requires_grad_()
    try:
        y = s(x, s.fresh().module)
        if y.requires_grad:
            y.sum().backward()
    except Exception as error:
        return one_line(error)
    return ""


def _found_step(s: Subject) -> StepCall | None:
    """Return the step that forward's parameters tell."""
    if not isinstance(s.call, Caller):
        return None
    length = next((n for n in s.lengths if n >= 5), None)
    return found_step(s.fresh().module, s.call, s.x(length)) if length else None


def _affordable(s: Subject) -> tuple[int, ...]:
    """Return the longer lengths that run in reasonable time; the module's context, and one more, are among them."""
    context = find_number(s.module, CONTEXTS)
    edges = {context, context + 1} if context and context < BEYOND else set()
    found = []
    for length in sorted({*TILES, *edges} - set(s.lengths)):
        begun = time.perf_counter()
        with torch.no_grad():
            if not accepts(s, length):
                continue
        found.append(length)
        if time.perf_counter() - begun > SECONDS:
            break
    return tuple(found)


def has_interface(module: nn.Module) -> bool:
    """Return whether it has attnlab's interface: a config with a cache_spec, forward(x, positions, cache, mask)."""
    names = inspect.signature(module.forward).parameters
    return isinstance(getattr(module, "config", None), AttentionConfig) and {"positions", "cache", "mask"} <= set(names)


def shaken(module: nn.Module, seed: int = 0, share: float = 0.1) -> nn.Module:
    """Add noise to every parameter, in place, and return the module.

    A projection that starts at zero would hide what is behind it. share: size of the noise, relative to the parameter's
    root mean square.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            if p.is_floating_point():
                size = float(p.pow(2).mean().sqrt()) or 0.5
                p.add_((share * size * torch.randn(p.shape, generator=generator)).to(p.dtype))
    return module


def find_number(holder: object, names: Sequence[str]) -> int | None:
    """Return the first of `names` that is a whole number among the holder's attributes, or among its config's."""
    for place in (holder, getattr(holder, "config", None)):
        for name in names:
            value = getattr(place, name, None)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return None


def accepted(s: Subject) -> tuple[tuple[int, ...], str]:
    """Return the lengths it can be called with, and the first reason why not with others.

    LENGTHS and LONGEST are tried first, then the module's context, then powers of two.
    """
    context = find_number(s.module, CONTEXTS)
    why = ""
    for lengths in ((*LENGTHS, LONGEST), (context,) if context else (), (4, 8, 16, 32, 64, 128)):
        found = []
        for length in lengths:
            try:
                s.fresh()(s.x(length, batch=2 if length != 2 else 3))  # a mask of pads [B T] is not taken for [T T]
                found.append(length)
            except UserError:
                raise
            except Exception as error:
                why = why or one_line(error)
        if found:
            return tuple(found), why
    return (), why


def specs(spec: CacheSpec) -> Iterator[CacheSpec]:
    """Yield the spec and those of every further memory beside it."""
    yield spec
    for further in spec.beside.values():
        yield from specs(further)


def accepts(s: Subject, length: int) -> bool:
    """Return whether the module can be called with this length."""
    try:
        s.fresh()(s.x(length))
    except Exception:
        return False
    return True
