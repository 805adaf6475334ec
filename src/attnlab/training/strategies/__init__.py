"""How one training step is shared out among processes. One file per strategy; what a run computes does not depend on it
beyond rounding, so it is no part of the run's config, and a run may go on under another.

    single      one process
    ddp         every process holds everything, and gradients are averaged
    fsdp        parameters, gradients and optimizer state are shared out (torch.distributed.fsdp.fully_shard)
    deepspeed   ZeRO; deepspeed:FILE.json gives its stage and the rest
"""

from __future__ import annotations

from importlib import import_module

from ...errors import UserError, choose
from ...runs.launcher import launched
from .single import Strategy as Strategy

NAMES = ("auto", "single", "ddp", "fsdp", "deepspeed")


def find(text: str) -> tuple[type[Strategy], str]:
    """The class that `text` names, and what follows its colon. auto: ddp where a launcher started several processes."""
    name, _, rest = text.partition(":")
    name = choose("strategy", name, NAMES)
    if rest and name != "deepspeed":
        raise UserError(f"the strategy {text!r} has settings, and {name} takes none: leave out ':{rest}'")
    if name == "auto":
        name = "ddp" if launched() > 1 else "single"
    if name == "single" and launched() > 1:
        raise UserError(
            f"the strategy is single, and a launcher started {launched()} processes: give ddp, fsdp or deepspeed, or "
            "start one process"
        )
    return import_module(f".{name}", __name__).Strategy, rest
