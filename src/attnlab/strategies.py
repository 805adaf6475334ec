"""How training is spread over several GPUs, and what each of them then keeps only a part of."""

from __future__ import annotations

from dataclasses import dataclass

from .results import read_json
from .spec import UserError, choose

NAMES = ("ddp", "fsdp", "deepspeed")

STAGES: dict[int, frozenset[str]] = {  # of ZeRO (Rajbhandari et al. 2019, arXiv 1910.02054): what is sharded
    0: frozenset(),
    1: frozenset({"optimizer"}),
    2: frozenset({"optimizer", "gradients"}),
    3: frozenset({"optimizer", "gradients", "weights"}),
}


@dataclass(frozen=True)
class Strategy:
    name: str
    stage: int  # of ZeRO, or what equals it
    by_rows: bool  # each tensor is cut between rows, as torch does; else all are cut as if they were one

    @property
    def sharded(self) -> frozenset[str]:
        return STAGES[self.stage]

    def __str__(self) -> str:
        return f"{self.name}, ZeRO stage {self.stage}" if self.name == "deepspeed" else self.name


def strategy(text: str) -> Strategy:
    """ "ddp", "fsdp" or "deepspeed[:FILE.json]", whose zero_optimization.stage is read; 1 where nothing is said."""
    name, _, file = text.partition(":")
    choose("strategy", name, NAMES)
    if name != "deepspeed":
        if file:
            raise UserError(f"the strategy {text!r} has a file, which deepspeed alone reads: give {name}")
        return Strategy(name, 3 if name == "fsdp" else 0, by_rows=True)
    return Strategy(name, stage_of(file) if file else 1, by_rows=False)


def stage_of(file: str) -> int:
    """What a config file of DeepSpeed says."""
    config = read_json(file)
    zero = config.get("zero_optimization", {}) if isinstance(config, dict) else None
    stage = zero.get("stage", 1) if isinstance(zero, dict) else None
    if stage not in STAGES:
        raise UserError(
            f"{file} has no ZeRO stage that is known: give zero_optimization.stage one of {', '.join(map(str, STAGES))}"
        )
    return int(stage)
