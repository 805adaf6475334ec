"""The commands. A verb is a function: its parameters are the options, its docstring is the help.

A module of this package defines functions and a table of them; what takes long to import is imported inside.
"""

from __future__ import annotations

from collections.abc import Callable

from . import convert, evaluate, heads, infer, patch, plan, prepare, workbench

VERBS: dict[str, Callable[..., int]] = {
    "demo": workbench.demo,
    "list": workbench.list_,
    "prepare": prepare.prepare,
    "tokenizer": prepare.tokenizer,
    "plan": plan.plan,
    "train": workbench.train,
    "sample": infer.sample,
    "infer": infer.infer,
    "eval": evaluate.evaluate,
    "patch": patch.patch,
    "export": patch.export,
    "convert": convert.convert,
    "heal": convert.heal,
    "compare": workbench.compare,
    "bench": workbench.bench,
    "audit": workbench.audit,
    "heads": heads.heads,
    "report": workbench.report,
}
