"""A synthetic task as a corpus without an end.

Training begins with sequences of a quarter of the context, then of half of it: two layers that must work together find
each other sooner where there is less to confuse.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.nn import functional as F

from ..config import DataConfig
from ..errors import UserError
from .corpus import Batch, Corpus
from .tasks import Task, task
from .tokenizer import CharTokenizer
from .tokens import Tokens

STAGES = ((500, 4), (1000, 2))  # (step, many): before this step, so many sequences share the context


@dataclass(frozen=True, eq=False, kw_only=True)
class Endless(Corpus):
    """A task as a corpus. Its `train` and `val` are one sequence each, to look at."""

    task: Task

    @classmethod
    def of(cls, config: DataConfig) -> Endless:
        """Return the task that `config.source` names. UserError where it is unknown, or `config` asks for more."""
        if config.tokenizer != "auto" or config.pack != "stream":
            raise UserError(
                f"{config.source!r} has symbols of its own and whole sequences: leave data.tokenizer and data.pack out"
            )
        found = task(config.source.removeprefix("task:"))
        train, _ = found.sequences(0, 0, 1, 64)
        val, _ = found.held_out(1, 64)
        return cls(
            source=config.source,
            tokenizer=CharTokenizer(found.symbols),
            train=Tokens.of(train[0]),
            val=Tokens.of(val[0]),
            task=found,
        )

    @property
    def order(self) -> int:
        """The version of the order in which it is read: it has no windows, so it is still the first."""
        return 1

    @cached_property
    def fingerprint(self) -> str:
        """The sha256 of the symbols and of some sequences: it changes when what is asked does."""
        digest = hashlib.sha256(self.task.symbols.encode())
        for length in (64, 67):
            for rows in self.task.sequences(0, 0, 64, length):
                digest.update(rows.astype("<i4").data)
        return digest.hexdigest()

    def check(self, context: int) -> None:
        """Raise UserError where the context, or its part that training begins with, is too short or too long."""
        self.task.check(context)
        self.task.check(context // STAGES[0][1])

    def batch(self, seed: int, step: int, batch_size: int, context: int, rank: int = 0, world: int = 1) -> Batch:
        """Return rows of one sequence each, or in early steps of several short ones, as documents.

        For the arguments, see `Corpus.batch`.
        """
        self.check(context)
        many = next((many for before, many in STAGES if step < before), 1)
        own = slice(batch_size * rank // world, batch_size * (rank + 1) // world)
        tokens, targets = self.task.sequences(seed, step, batch_size * many, context // many)
        x = torch.from_numpy(tokens.reshape(batch_size, -1)[own])
        y = torch.from_numpy(targets.reshape(batch_size, -1)[own])
        if many == 1:
            return Batch(x, y)
        document = torch.arange(many).repeat_interleave(context // many).expand_as(x)
        pad = (0, context % many)
        return Batch(F.pad(x, pad), F.pad(y, pad, value=-1), F.pad(document, pad, value=-1))

    def windows(self, count: int, context: int, split: str = "val") -> Batch:
        """Return `count` held-out sequences, always the same."""
        tokens, targets = self.task.held_out(count, context)
        return Batch(torch.from_numpy(tokens), torch.from_numpy(targets))
