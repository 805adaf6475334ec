"""A mechanism that says itself how a dense layer becomes it: `weights_from` in its own module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import UserError
from .calibration import Statistics
from .dense import Dense
from .width import Budget

KEPT = ("head_dim", "n_kv_heads", "rope_theta", "bias", "o_bias", "qk_norm", "cap")  # fields that mean the same in both
METHOD = "own"  # the name of the one way to make the weights


@dataclass(frozen=True)
class OwnWeights:
    """A target of conversions, with the interface of the files in `targets/`, made from one function."""

    mechanism: str
    function: Callable[[Dense, Any], Mapping[str, Tensor]]  # weights_from(source, config) -> a state dict
    METHODS: Mapping[str, bool]

    @classmethod
    def of(cls, mechanism: str, function: Callable[[Dense, Any], Mapping[str, Tensor]]) -> OwnWeights:
        """Return the target whose module defines `function`."""
        return cls(mechanism, function, {METHOD: False})

    def widths(self, source: Dense, budget: Budget) -> dict[str, Any]:
        """Return the source's own values of fields that the mechanism has too, and its `cache_width` as wide as `rank`
        says. Raises `UserError` where a rank is given and there is no such field."""
        usual = budget.build(budget.given)
        fields = {name: getattr(source.config, name) for name in KEPT if hasattr(usual, name)}
        fields = {name: value for name, value in fields.items() if getattr(usual, name) != value}
        fields = {name: value for name, value in fields.items() if name not in budget.given}
        if budget.rank is None:
            return fields
        name = usual.cache_width
        if name is None:
            raise UserError(f"rank {budget.rank} is given, but {self.mechanism} has no width to choose: leave it out")
        others = {other: value for other, value in fields.items() if other != name}
        widest = getattr(usual, name) if isinstance(budget.rank, float) else budget.rank
        widths = [width for width in range(1, widest + 1) if _builds(budget, others | {name: width})]
        return others | {name: budget.choose(name, widths, **others)}

    def weights(
        self, source: Dense, config: Any, method: str, seen: Statistics | None
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return no further fields, and the tensors that the mechanism makes. Raises `UserError` where it makes other
        things than tensors by name."""
        found = self.function(source, config)
        named = isinstance(found, Mapping) and all(
            isinstance(name, str) and isinstance(value, Tensor) for name, value in found.items()
        )
        if not named:
            raise UserError(
                f"weights_from of {self.mechanism} returned {type(found).__name__}: it must return tensors by name"
            )
        return {}, dict(found)


def _builds(budget: Budget, fields: Mapping[str, Any]) -> bool:
    """Return whether the mechanism takes these fields."""
    try:
        budget.build({**budget.given, **fields})
    except UserError:
        return False
    return True
