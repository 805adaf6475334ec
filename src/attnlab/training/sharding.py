"""The parts of training that several processes share, by ZeRO's stages."""

from __future__ import annotations

from dataclasses import dataclass

STAGES: dict[int, frozenset[str]] = {  # of ZeRO (Rajbhandari et al. 2019, arXiv 1910.02054): what is sharded
    0: frozenset(),
    1: frozenset({"optimizer"}),
    2: frozenset({"optimizer", "gradients"}),
    3: frozenset({"optimizer", "gradients", "weights"}),
}


@dataclass(frozen=True)
class Sharding:
    """The sharding of one strategy."""

    name: str  # of the strategy, as results show it
    stage: int  # of ZeRO, or the one that is equal to it
    by_rows: bool = False  # whether each tensor is cut between rows, as torch does; else all are cut as one vector
    buckets: bool = False  # whether gradients stay in the buffers that they are sent from

    @property
    def sharded(self) -> frozenset[str]:
        """The tensors of which each process keeps only a part: weights, gradients, optimizer."""
        return STAGES[self.stage]

    def __str__(self) -> str:
        return self.name
