"""A synthetic task as a corpus without an end."""

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

STAGES = ((500, 4), (1000, 2))  # before this step, how many sequences share the context


@dataclass(frozen=True, eq=False, kw_only=True)
class Endless(Corpus):
    """A task as a corpus. What it has of text is one sequence, for whoever wants to look at one."""

    task: Task

    @classmethod
    def of(cls, config: DataConfig) -> Endless:
        if config.tokenizer != "auto" or config.pack != "stream":
            raise UserError(
                f"{config.source!r} has symbols of its own and whole sequences: leave data.tokenizer and data.pack out"
            )
        found = task(config.source.removeprefix("task:"))
        train, val = (Tokens.of(rows[0][0]) for rows in (found.sequences(0, 0, 1, 64), found.held_out(1, 64)))
        symbols = CharTokenizer(found.symbols)
        return cls(source=config.source, tokenizer=symbols, train=train, val=val, task=found)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the symbols and of some sequences: it changes when what is asked does."""
        digest = hashlib.sha256(self.task.symbols.encode())
        for length in (64, 67):
            for rows in self.task.sequences(0, 0, 64, length):
                digest.update(rows.astype("<i4").data)
        return digest.hexdigest()

    def check(self, context: int) -> None:
        """UserError where the context, or the part of it that training begins with, is too short or too long."""
        self.task.check(context)
        self.task.check(context // STAGES[0][1])

    def batch(self, seed: int, step: int, batch_size: int, context: int, rank: int = 0, world: int = 1) -> Batch:
        """Rows of one sequence each, or in early steps of several short ones, as documents; see `Corpus.batch`."""
        self.check(context)
        many = next((many for before, many in STAGES if step < before), 1)
        own = slice(batch_size * rank // world, batch_size * (rank + 1) // world)
        tokens, targets = self.task.sequences(seed, step, batch_size * many, context // many)
        x, y = (torch.from_numpy(part.reshape(batch_size, -1)[own]) for part in (tokens, targets))
        if many == 1:
            return Batch(x, y)
        document = torch.arange(many).repeat_interleave(context // many).expand_as(x)
        pad = (0, context % many)
        return Batch(F.pad(x, pad), F.pad(y, pad, value=-1), F.pad(document, pad, value=-1))

    def windows(self, count: int, context: int, split: str = "val") -> Batch:
        return Batch(*map(torch.from_numpy, self.task.held_out(count, context)))
