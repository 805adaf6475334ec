"""Sharding by strategy: the tensors of which each GPU keeps a part."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UserError, choose
from ..training.strategies.deepspeed import settings_of

STAGES: dict[int, frozenset[str]] = {  # of ZeRO (Rajbhandari et al. 2019, arXiv 1910.02054): what is sharded
    0: frozenset(),
    1: frozenset({"optimizer"}),
    2: frozenset({"optimizer", "gradients"}),
    3: frozenset({"optimizer", "gradients", "weights"}),
}


@dataclass(frozen=True)
class Sharding:
    """The sharding of a strategy."""

    name: str
    stage: int  # of ZeRO, or the stage that it equals
    by_rows: bool = False  # each tensor is cut between rows, as PyTorch does; else all are cut as if they were one
    buckets: bool = False  # gradients lie in buckets for communication, which stay in memory all the time

    @property
    def sharded(self) -> frozenset[str]:
        """The kinds of tensors that are sharded: optimizer, gradients, weights."""
        return STAGES[self.stage]

    def __str__(self) -> str:
        return f"{self.name}, ZeRO stage {self.stage}" if self.name == "deepspeed" else self.name


PLAIN = {
    "ddp": Sharding("ddp", 0, buckets=True),
    "fsdp": Sharding("fsdp", 3, by_rows=True),
}


def find_sharding(text: str) -> Sharding:
    """Return the sharding of "ddp", "fsdp" or "deepspeed[:FILE.json]". Raises `UserError` for anything else."""
    name, _, file = text.partition(":")
    choose("strategy", name, (*PLAIN, "deepspeed"))
    if name == "deepspeed":
        return Sharding(name, settings_of(file)["zero_optimization"]["stage"])
    if file:
        raise UserError(f"the strategy {text!r} has a file, which deepspeed alone reads: give {name}")
    return PLAIN[name]
