"""The environment variables by which a launcher (torchrun, accelerate, deepspeed) informs a process."""

from __future__ import annotations

import os

from ..errors import UserError, quoted

NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")
DIGITS = 9  # of the largest of them


def launched() -> int:
    """Return the number of processes; 1 without a launcher, and where its variables make no sense."""
    size = _number("WORLD_SIZE", 1) if "RANK" in os.environ else 1
    return size if 0 <= _number("RANK", 0) < size else 1


def rank() -> int:
    """Return the number of this process, from 0."""
    return _number("RANK", 0) if launched() > 1 else 0


def check_launcher() -> None:
    """Raise `UserError` where a variable of a launcher makes no sense, as where one was left over."""
    for name in NUMBERS:
        if _number(name, 0) < 0:
            given = quoted(os.environ[name])
            raise UserError(f"the environment has {name}={given}, which no launcher sets: unset it, or give a number")
    if "RANK" in os.environ and not _number("RANK", 0) < _number("WORLD_SIZE", 1):
        raise UserError(
            f"the environment has RANK={os.environ['RANK']} of WORLD_SIZE={os.environ.get('WORLD_SIZE', '1')}: a rank "
            "counts from 0 to one below the size; unset both, or start it by a launcher"
        )


def restarted() -> bool:
    """Return whether this process replaces one that failed (torchrun --max-restarts)."""
    return _number("TORCHELASTIC_RESTART_COUNT", 0) > 0


def _number(name: str, otherwise: int) -> int:
    """A variable as a number: `otherwise` where it is not set, -1 where it is none."""
    text = os.environ.get(name)
    if text is None:
        return otherwise
    return int(text) if text.isascii() and text.isdigit() and len(text) <= DIGITS else -1


def lasting_store() -> bool:
    """Return whether processes find each other through torchrun's own store, which stays when they end."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
