"""What a launcher (torchrun, accelerate, deepspeed) tells a process that it started, by environment variables."""

from __future__ import annotations

import os


def launched() -> int:
    """How many processes there are; 1 where no launcher is."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def rank() -> int:
    """The number of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def restarted() -> bool:
    """Whether this process stands in the place of one that failed (torchrun --max-restarts)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def lasting_store() -> bool:
    """Whether processes find each other through a store of torchrun's own, which outlives them."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
