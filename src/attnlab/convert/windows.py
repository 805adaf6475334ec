"""Windows of layers: how far back a layer sees, and what may stand in its place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import UserError
from ..spec import AttentionConfig


def seen_window(config: AttentionConfig, context: int) -> int | None:
    """Return the tokens that a layer sees, itself among them; None: all of the context.

    A ring of rows is all that such a layer remembers.
    """
    spec = config.cache_spec
    bounded = spec.keep is not None and not spec.beside and not spec.state
    return spec.keep if bounded and spec.keep is not None and spec.keep < context else None


def check_windows(old: Sequence[Any], new: Sequence[AttentionConfig], context: int, mechanism: str) -> None:
    """Raise `UserError` where a layer of `mechanism` (`new`) sees more tokens than the one in its place (`old`).

    Each of `old` has its Config as `config`.
    """
    for i, (before, after) in enumerate(zip(old, new, strict=True)):
        window = seen_window(before.config, context)
        wider = seen_window(after, context)
        if window is not None and (wider is None or wider > window):
            raise UserError(
                f"layer {i} of this model sees the last {window} tokens, and {mechanism} would see "
                f"{'all' if wider is None else wider}, with as many in its cache: convert to one with a window, "
                "or add drop_window (--drop-window)"
            )
