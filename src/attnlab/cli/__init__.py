"""The table of commands. A command is a function in a file of its own: its parameters are the options, its docstring is
the help. A module that takes long to import is imported inside the function.
"""

from __future__ import annotations

from collections.abc import Callable

from . import (
    audit,
    bench,
    compare,
    convert,
    demo,
    eval,
    export,
    heads,
    heal,
    infer,
    list,
    patch,
    plan,
    prepare,
    report,
    sample,
    status,
    tokenizer,
    train,
)

COMMANDS: dict[str, Callable[..., int]] = {
    "demo": demo.demo,
    "list": list.list_,
    "prepare": prepare.prepare,
    "tokenizer": tokenizer.tokenizer,
    "plan": plan.plan,
    "train": train.train,
    "status": status.status,
    "sample": sample.sample,
    "infer": infer.infer,
    "eval": eval.evaluate,
    "patch": patch.patch,
    "export": export.export,
    "convert": convert.convert,
    "heal": heal.heal,
    "compare": compare.compare,
    "bench": bench.bench,
    "audit": audit.audit,
    "heads": heads.heads,
    "report": report.report,
}

# Commands whose result is in files: they go on where nobody reads what they print.
LASTING = ("demo", "prepare", "train", "patch", "export", "convert", "heal", "compare", "report")
