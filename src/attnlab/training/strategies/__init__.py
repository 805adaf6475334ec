"""Strategies: how processes share the work of a training step. One file each, and the folder listing is the registry.

What a run computes does not depend on its strategy beyond rounding. So the strategy is no part of the run's config, and
a run may go on under another one.

    single      one process
    ddp         every process holds everything, and gradients are averaged
    fsdp        parameters, gradients and optimizer state are sharded (torch.distributed.fsdp.fully_shard)
    deepspeed   ZeRO; deepspeed:FILE.json gives its stage and the rest
"""

from __future__ import annotations

import pkgutil
from importlib import import_module

from ...errors import UserError, choose
from ...runs.launcher import launched
from .single import Strategy as Strategy


def names() -> list[str]:
    """Return every strategy: first those without settings, and the one that shards the least first of all."""

    def place(name: str) -> tuple[bool, int]:
        kind = strategy(name)
        return kind.takes_settings, -1 if kind.sharding is None else kind.sharding.stage

    return sorted((module.name for module in pkgutil.iter_modules(__path__)), key=place)


def strategy(name: str) -> type[Strategy]:
    """Return the class of a strategy, one of `names`."""
    return import_module(f".{name}", __name__).Strategy


def of_several() -> list[str]:
    """Return the strategies for several processes."""
    return [name for name in names() if strategy(name).sharding]


def find(text: str) -> tuple[type[Strategy], str]:
    """Return the class that `text` names, and the settings after its colon.

    auto: ddp if a launcher started several processes, else single. Raises `UserError` for an unknown strategy, for
    settings that it does not take, and for several processes under a strategy of one.
    """
    name, _, settings = text.partition(":")
    choose("strategy", name, ("auto", *names()))
    if settings and (name == "auto" or not strategy(name).takes_settings):
        raise UserError(f"the strategy {text!r} has settings, and {name} takes none: leave out ':{settings}'")
    if name == "auto":
        name = "ddp" if launched() > 1 else "single"
    kind = strategy(name)
    if kind.sharding is None and launched() > 1:
        *others, last = of_several()
        raise UserError(
            f"the strategy is {name}, and a launcher started {launched()} processes: give {', '.join(others)} or "
            f"{last}, or start one process"
        )
    return kind, settings
