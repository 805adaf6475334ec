"""The laws of attention, each stated once.

The tests put them to every mechanism, and `attnlab audit` to anyone's attention class.

A law is a plain function of a `Subject`. It returns a sentence of evidence where it holds, raises `Broken` with the
smallest counterexample it can find, and `NotApplicable` with the reason where it says nothing about this module. Laws
marked "module" ask only for x [B T D] -> y [B T D]; laws marked "interface" need ours (positions, cache, mask).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from .. import attention
from ..errors import choose
from ..results import LawResult
from ..spec import AttentionConfig
from . import any_module, caches, causality, computation, interface
from .subject import Broken, ModuleCall, NotApplicable, Subject, one_line, seeded, subject

SMALL = {"d_model": 24, "n_heads": 4, "head_dim": 8}


@dataclass(frozen=True)
class Law:
    """A law of the list."""

    name: str
    needs: str  # "module" or "interface"
    check: Callable[[Subject], str]

    @property
    def statement(self) -> str:
        """The law in one line: the first line of its function's docstring."""
        return (self.check.__doc__ or "").strip().splitlines()[0]


LAWS: dict[str, Law] = {
    law.name: law
    for law in (
        Law("causality", "module", causality.causality),
        Law("mixing", "module", causality.mixing),
        Law("no dead parameters", "module", any_module.no_dead_parameters),
        Law("batch independence", "module", any_module.batch_independence),
        Law("determinism", "module", any_module.determinism),
        Law("finiteness", "module", any_module.finiteness),
        Law("save and load", "module", any_module.save_and_load),
        Law("chunks", "interface", caches.chunks),
        Law("rewind", "interface", caches.rewind),
        Law("fork", "interface", caches.fork),
        Law("left padding", "interface", interface.left_padding),
        Law("masked rows", "interface", interface.masked_rows),
        Law("isolated documents", "interface", interface.isolated_documents),
        Law("cache size", "interface", caches.cache_size),
        Law("held rows", "interface", caches.held_rows),
        Law("plain path", "interface", interface.plain_path),
        Law("own layers", "interface", interface.own_layers),
        Law("relative position", "interface", interface.relative_position),
        Law("kernels", "interface", computation.kernels),
        Law("gradients", "interface", computation.gradients),
        Law("attention maps", "interface", interface.attention_maps),
        Law("compile", "interface", computation.compiles),
        Law("bfloat16", "interface", computation.bfloat16),
        Law("flops", "interface", computation.flops),
    )
}


def check_mechanism(name: str, *, laws: Sequence[str] | None = None, **fields: Any) -> list[LawResult]:
    """Put every law to a mechanism of the registry, small and in each of its Config's variants.

    laws: the names of some; None: all. fields: override those settings. Return one result per law, broken where one
    setting breaks it. UserError where the mechanism or a law is unknown.
    """
    module = attention.module(name)
    return check_class(name, module.Config, module.Attention, laws=laws, **fields)


def check_class(
    name: str,
    config: type[AttentionConfig],
    layer: Callable[[Any], nn.Module],
    *,
    laws: Sequence[str] | None = None,
    **fields: Any,
) -> list[LawResult]:
    """Do the same for any `Config` and `Attention` that follow the interface."""
    subjects = []
    for seed, (words, variant) in enumerate({"": {}, **config.variants}.items()):
        chosen = config(**{**SMALL, **variant, **fields})
        with seeded(seed):
            module = layer(chosen)
        build = functools.partial(layer, chosen)
        subjects.append((words, subject(module, name=name, build=build, seed=seed)))
    return [_judge(law, name, subjects) for law in _chosen(laws)]


def check_module(
    module: nn.Module,
    *,
    d_model: int | None = None,
    call: ModuleCall | None = None,
    build: Callable[[], nn.Module] | None = None,
    laws: Sequence[str] | None = None,
    name: str | None = None,
) -> list[LawResult]:
    """Put every law that applies to `module`, which is copied and left as it was. Return one result per law.

    d_model: width D of its input, unless its attributes tell. call: `(module, x) -> y`, unless it is `module(x)`.
    build: makes a fresh module of the same shape. laws: the names of some; None: all. UserError where the module cannot
    be called at all.
    """
    s = subject(module, name=name or type(module).__name__, d_model=d_model, call=call, build=build)
    return check_subject(s, laws)


def check_subject(s: Subject, laws: Sequence[str] | None = None) -> list[LawResult]:
    """Do the same for a module that is already prepared."""
    return [_judge(law, s.name, [("", s)]) for law in _chosen(laws)]


def check_attention(
    module: nn.Module,
    *,
    d_model: int | None = None,
    call: ModuleCall | None = None,
    build: Callable[[], nn.Module] | None = None,
    laws: Sequence[str] | None = None,
) -> list[LawResult]:
    """Return the results of `check_module`, for a test of your own.

    AssertionError with each counterexample if a law is broken.
    """
    results = check_module(module, d_model=d_model, call=call, build=build, laws=laws)
    broken = [r for r in results if r.status == "broken"]
    if broken:
        lines = [f"  {r.law}: {r.detail}\n    the law: {r.statement}" for r in broken]
        raise AssertionError("\n".join([f"{verdict(results)}", *lines]))
    return results


def verdict(results: Sequence[LawResult]) -> str:
    """Return one line about all results: which laws are broken, or how many hold."""
    ran = [r for r in results if r.status != "n/a"]
    broken = [r.law for r in ran if r.status == "broken"]
    name = results[0].mechanism
    if broken:
        return f"{name} breaks {len(broken)} of {len(ran)} laws: {', '.join(broken)}"
    return f"{name} obeys all {len(ran)} laws that apply" if ran else f"{name}: no law applies"


def _chosen(laws: Sequence[str] | None) -> list[Law]:
    return [LAWS[choose("law", name, LAWS)] for name in (LAWS if laws is None else laws)]


def _judge(law: Law, name: str, subjects: Sequence[tuple[str, Subject]]) -> LawResult:
    held: list[str] = []
    reasons: list[str] = []
    for words, s in subjects:
        try:
            if law.needs == "interface" and s.call is not None:
                raise NotApplicable("it needs attnlab's interface: forward(x, positions, cache, mask)")
            held.append(law.check(s.fresh()))
        except NotApplicable as reason:
            reasons.append(str(reason))
        except Exception as error:
            text = str(error) if isinstance(error, Broken) else f"stops with {one_line(error)}"
            detail = f"{text} (variant {words!r})" if words else text
            return LawResult(law=law.name, mechanism=name, status="broken", detail=detail, statement=law.statement)
    status = "holds" if held else "n/a"
    return LawResult(law=law.name, mechanism=name, status=status, detail=(held or reasons)[0], statement=law.statement)
