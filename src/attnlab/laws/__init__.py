"""The laws of attention, each stated once.

The tests put them to every mechanism, and `attnlab audit` to anyone's attention class.

A law is a plain function of a `Subject`. It returns a sentence of evidence where it holds, raises `Broken` with the
smallest counterexample it can find, and `NotApplicable` with the reason where it says nothing about this module. Laws
marked "module" ask only for x [B T D] -> y [B T D], those marked "decoding" also for a way to call one step with a
cache, and those marked "interface" for ours (positions, cache, mask).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from .. import attention
from ..errors import choose
from ..ranges import Count, checked
from ..results import NOT_DECODED, LawResult, Tell, judged, verdict
from ..spec import AttentionConfig
from . import any_module, caches, causality, computation, interface, precision, stack
from .call import Caller, in_full
from .functions import FunctionCaller, of_function
from .prepare import subject
from .state import seeded
from .subject import Broken, ModuleCall, NotApplicable, StepCall, Subject

NO_INTERFACE = "it needs attnlab's interface: forward(x, positions, cache, mask)"
SMALL = {"d_model": 24, "n_heads": 4, "head_dim": 8}


@dataclass(frozen=True)
class Law:
    """A law of the list."""

    name: str
    needs: str  # "module", "decoding" or "interface"
    check: Callable[[Subject], str]
    once: bool = False  # put to a mechanism's defaults alone, because it takes long

    @property
    def statement(self) -> str:
        """The law in one line: the first line of its function's docstring."""
        return (self.check.__doc__ or "").strip().splitlines()[0]


LAWS: dict[str, Law] = {
    law.name: law
    for law in (
        Law("causality", "module", causality.causality),
        Law("prefix", "module", causality.prefix),
        Law("mixing", "module", causality.mixing),
        Law("no dead parameters", "module", any_module.no_dead_parameters),
        Law("batch independence", "module", any_module.batch_independence),
        Law("determinism", "module", any_module.determinism),
        Law("modes", "module", any_module.modes),
        Law("finiteness", "module", any_module.finiteness),
        Law("save and load", "module", any_module.save_and_load),
        Law("gradients", "module", computation.gradients),
        Law("bfloat16", "module", computation.bfloat16),
        Law("long bfloat16", "interface", precision.long_bfloat16, once=True),
        Law("chunks", "decoding", caches.chunks),
        Law("rewind", "decoding", caches.rewind),
        Law("fork", "decoding", caches.fork),
        Law("cache size", "decoding", caches.cache_size),
        Law("left padding", "interface", interface.left_padding),
        Law("pads anywhere", "interface", interface.pads_anywhere),
        Law("masked rows", "interface", interface.masked_rows),
        Law("isolated documents", "interface", interface.isolated_documents),
        Law("held rows", "interface", caches.held_rows),
        Law("plain path", "interface", interface.plain_path),
        Law("own layers", "interface", interface.own_layers),
        Law("relative position", "interface", interface.relative_position),
        Law("kernels", "interface", computation.kernels),
        Law("attention maps", "interface", interface.attention_maps),
        Law("given rows", "interface", interface.given_rows),
        Law("compile", "interface", computation.compiles),
        Law("flops", "interface", computation.flops),
    )
}


@checked
def check_mechanism(
    name: str,
    *,
    laws: Sequence[str] | None = None,
    allow: Sequence[str] = (),
    tell: Tell | None = None,
    **fields: Any,
) -> list[LawResult]:
    """Put every law to a mechanism of the registry, small and in each of its Config's variants.

    laws: the names of some; None: all. allow: the names of laws that may be broken. fields: override those settings.
    Return one result per law, broken where one setting breaks it. UserError where the mechanism or a law is unknown.
    """
    module = attention.module(name)
    return check_class(name, module.Config, module.Attention, laws=laws, allow=allow, tell=tell, **fields)


@checked
def check_class(
    name: str,
    config: type[AttentionConfig],
    layer: Callable[[Any], nn.Module],
    *,
    laws: Sequence[str] | None = None,
    allow: Sequence[str] = (),
    tell: Tell | None = None,
    **fields: Any,
) -> list[LawResult]:
    """Do the same for any `Config` and `Attention` that follow the interface."""
    subjects = []
    for seed, (words, variant) in enumerate({"": {}, **config.variants}.items()):
        chosen = config(**{**SMALL, **variant, **fields})
        with seeded(seed):
            module = stack.judged_layer(layer, chosen)
        build = functools.partial(stack.judged_layer, layer, chosen)
        subjects.append((words, subject(module, name=name, build=build, seed=seed)))
    return _judge_all(name, subjects, laws, allow, tell)


@checked
def check_module(
    module: nn.Module | Callable[..., Any],
    *,
    d_model: Count | None = None,
    call: ModuleCall | None = None,
    step: StepCall | None = None,
    build: Callable[[], nn.Module] | None = None,
    laws: Sequence[str] | None = None,
    allow: Sequence[str] = (),
    name: str | None = None,
) -> list[LawResult]:
    """Put every law that applies to `module`, which is copied and left as it was. Return one result per law.

    module: or a function of q, k, v, each [B H T D], [B T H D] or [B T D]. d_model: width D of its input, unless its
    attributes tell. call: `(module, x) -> y`, unless it is `module(x)`. step: `(module, x, cache, start) -> (y, cache)`
    decodes the tokens x [B T D] from `start` on; the first cache is None; found out where forward's parameters tell.
    build: makes a fresh module of the same shape. laws: the names of some; None: all. allow: the names of laws that may
    be broken. UserError where the module cannot be called at all.
    """
    called = name or str(getattr(module, "__name__", type(module).__name__))
    if not isinstance(module, nn.Module):
        caller = Caller("function(q, k, v)")
        module = of_function(module, caller)
        call = call or FunctionCaller(caller)
    s = subject(module, name=called, d_model=d_model, call=call, step=step, build=build)
    return check_subject(s, laws, allow)


def check_subject(
    s: Subject, laws: Sequence[str] | None = None, allow: Sequence[str] = (), tell: Tell | None = None
) -> list[LawResult]:
    """Do the same for a module that is already prepared."""
    return _judge_all(s.name, [("", s)], laws, allow, tell)


def _judge_all(
    name: str,
    subjects: Sequence[tuple[str, Subject]],
    laws: Sequence[str] | None,
    allow: Sequence[str],
    tell: Tell | None,
) -> list[LawResult]:
    """Return one result per chosen law, in the order of the list. allow: laws whose breach is no finding."""
    for allowed in allow:
        choose("law", allowed, LAWS)
    chosen = _chosen(laws)
    results = []
    for done, law in enumerate(chosen):
        if tell is not None:
            tell(law.name, done, len(chosen))
        result = _judge(law, name, subjects)
        results.append(dataclasses.replace(result, status="allowed") if _is_allowed(result, allow) else result)
    return results


def _is_allowed(result: LawResult, allow: Sequence[str]) -> bool:
    return result.status == "broken" and result.law in allow


@checked
def check_attention(
    module: nn.Module | Callable[..., Any],
    *,
    d_model: Count | None = None,
    call: ModuleCall | None = None,
    step: StepCall | None = None,
    build: Callable[[], nn.Module] | None = None,
    laws: Sequence[str] | None = None,
    allow: Sequence[str] = (),
) -> list[LawResult]:
    """Return the results of `check_module`, for a test of your own.

    AssertionError with each counterexample if a law is broken, or if none of them applies.
    """
    results = check_module(module, d_model=d_model, call=call, step=step, build=build, laws=laws, allow=allow)
    broken = [r for r in results if r.status == "broken"]
    if broken or not judged(results):
        lines = [f"  {r.law}: {r.detail}\n    the law: {r.statement}" for r in broken or results]
        raise AssertionError("\n".join([f"{verdict(results)}", *lines]))
    return results


def _chosen(laws: Sequence[str] | None) -> list[Law]:
    return [LAWS[choose("law", name, LAWS)] for name in (LAWS if laws is None else laws)]


def _judge(law: Law, name: str, subjects: Sequence[tuple[str, Subject]]) -> LawResult:
    held: list[str] = []
    reasons: list[str] = []
    for words, s in subjects[:1] if law.once else subjects:
        try:
            _require_what_it_needs(law, s)
            held.append(law.check(s.fresh()))
        except NotApplicable as reason:
            reasons.append(str(reason))
        except Exception as error:
            text = str(error) if isinstance(error, Broken) else f"stops with {in_full(error)}"
            if not isinstance(error, Broken) and not _runs(s):
                reasons.append(text)
                continue
            detail = f"{text} (variant {words!r})" if words else text
            return LawResult(law=law.name, mechanism=name, status="broken", detail=detail, statement=law.statement)
    status = "holds" if held else "n/a"
    return LawResult(law=law.name, mechanism=name, status=status, detail=(held or reasons)[0], statement=law.statement)


def _require_what_it_needs(law: Law, s: Subject) -> None:
    """Raise `NotApplicable` where the subject is somebody's module without what the law needs."""
    if s.call is None or law.needs == "module":
        return
    if law.needs == "interface":
        raise NotApplicable(NO_INTERFACE)
    if s.step is None:
        raise NotApplicable(NOT_DECODED)


def _runs(s: Subject) -> bool:
    """Return whether an ordinary call runs: an exception is a finding only then."""
    try:
        s.fresh()(s.x())
    except Exception:
        return False
    return True
