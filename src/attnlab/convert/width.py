"""Width of the new mechanism: a number, or a share of the cache that the old one held."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import UserError
from ..spec import AttentionConfig

Build = Callable[[Mapping[str, Any]], AttentionConfig]  # fields of the target -> its Config in this model


@dataclass(frozen=True)
class Budget:
    """Width that one layer of the target may have."""

    rank: int | float | None  # int: a width; float: a share of the source's cache; None: the widest, which loses least
    given: Mapping[str, Any]  # further fields of the target's Config, as the user gave them
    build: Build
    context: int  # tokens
    floats: int  # size of the source's cache at that context, one layer

    def choose(self, field: str, widths: Sequence[int], **others: Any) -> int:
        """Return the value of `field`, one of `widths` (ascending), where the target has the fields `others` too.

        Raises `UserError` for another width, for a share that is none or too small, and where both rank and an option
        are given.
        """
        if field in self.given:
            if self.rank is not None:
                raise UserError(f"rank {self.rank} is given and so is the option {field}: leave one of them out")
            return self.among(field, self.given[field], widths)
        if self.rank is None:
            return widths[-1]
        if isinstance(self.rank, int):
            return self.among(field, self.rank, widths)
        fits = [w for w in widths if self.share(others | {field: w}) <= self.rank]
        if not fits:
            least = self.share(others | {field: widths[0]})
            raise UserError(
                f"rank {self.rank} is too little: {field} {widths[0]}, the least, needs {least:.3f} of the cache"
            )
        return fits[-1]

    def beside(self, fields: Mapping[str, Any]) -> Budget:
        """Return the same budget for a target that has these fields as well."""
        return replace(self, given={**self.given, **fields})

    def share(self, fields: Mapping[str, Any]) -> float:
        """Return the size of the target's cache with these fields, as a share of the source's."""
        return self.build({**self.given, **fields}).cache_spec.floats(self.context) / self.floats

    def among(self, field: str, width: int, widths: Sequence[int]) -> int:
        """Return `width`. Raises `UserError` where it is none of `widths` (ascending)."""
        if width not in widths:
            allowed = f"1 to {widths[-1]}" if len(widths) == widths[-1] else f"one of {', '.join(map(str, widths))}"
            raise UserError(f"{field} {width} does not fit this model: give {allowed}, or a share of its cache, as 0.5")
        return width
