"""The environment variables by which a launcher (torchrun, accelerate, deepspeed) informs a process."""

from __future__ import annotations

import os


def launched() -> int:
    """Return the number of processes; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def rank() -> int:
    """Return the number of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def restarted() -> bool:
    """Return whether this process replaces one that failed (torchrun --max-restarts)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def lasting_store() -> bool:
    """Return whether processes find each other through torchrun's own store, which stays when they end."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
