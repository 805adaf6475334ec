"""The sharding of a strategy, by its name."""

from __future__ import annotations

from ..errors import UserError, choose
from ..training import strategies
from ..training.sharding import STAGES as STAGES
from ..training.sharding import Sharding as Sharding


def find_sharding(text: str) -> Sharding:
    """Return how a strategy shards: "ddp", "fsdp" or "deepspeed[:FILE.json]", as `attnlab train` takes them.

    Raises `UserError` for an unknown strategy, and for a file that it does not read.
    """
    name, _, file = text.partition(":")
    several = strategies.of_several()
    kind = strategies.strategy(choose("strategy", name, several))
    if file and not kind.takes_settings:
        readers = " and ".join(each for each in several if strategies.strategy(each).takes_settings)
        raise UserError(f"the strategy {text!r} has a file, which {readers} alone reads: give {name}")
    return kind.shards(file)
