"""Synthetic tasks: what was seen must be found again, which tells mechanisms apart where a loss on text does not.

A task is a corpus without an end. Each sequence is made of random numbers that (seed, step) alone decide; held-out ones
come from a stream that no seed reaches; what belongs to what is drawn anew for each, so there is nothing to learn by
heart. A target of -1 is a place where nothing is asked. Every answer follows from earlier tokens and from no less: the
current token and its position leave all answers equally likely, and their number gives the level of chance.

Training begins with sequences of a quarter of the context, then of half of it: two layers that must work together find
each other sooner where there is less to confuse.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from ..config import DataConfig
from ..errors import UserError, choose

HELD_OUT = 2**63  # seeds stay below it

# Symbols are characters, so that a sequence can be read; a token's id is the place of its character among them.
NOISE, LETTERS, MARK = ".", "abcdefghijklmnopqrstuvwxyz", "|"
KEYS = "".join(map(chr, range(0x410, 0x450)))  # Cyrillic
MANY = "".join(map(chr, range(0x100, 0x200)))
FEW = MANY[:64]
LETTER, MARKED, KEY = 1, 1 + len(LETTERS), 1 + len(LETTERS)  # ids of the first letter, of the mark, of the first key
BLOCK, NEEDLES = 4, 2


class Dice:
    """The random numbers of some sequences, int64 [rows, many], used up from left to right."""

    def __init__(self, raw: np.ndarray):
        self.raw = raw
        self.used = 0

    @property
    def rows(self) -> int:
        return len(self.raw)

    def below(self, limit: int, count: int) -> np.ndarray:
        """[rows count], each from 0 to limit - 1."""
        return (self._take(count) % np.uint64(limit)).astype(np.int64)

    def chosen(self, many: int, count: int) -> np.ndarray:
        """[rows count], different ones of 0 .. many - 1, in random order."""
        return self._take(many).argsort(axis=1, kind="stable")[:, :count]

    def _take(self, count: int) -> np.ndarray:
        self.used += count
        assert self.used <= self.raw.shape[1], "a sequence needs more random numbers than it was given"
        return self.raw[:, self.used - count : self.used]


Sequences = tuple[np.ndarray, np.ndarray]  # tokens and targets, [rows length]


@dataclass(frozen=True)
class Task:
    name: str
    tests: str  # what, in a sentence
    symbols: str  # in ascending order
    answers: int  # equally likely to a reader of the current token alone
    make: Callable[[Dice, int], Sequences]
    shortest: int = 8  # tokens that a sequence needs
    longest: int | None = None
    depth: Callable[[np.ndarray], np.ndarray] | None = None  # of each answer: 0 at the start, 1 before the questions

    @property
    def chance(self) -> float:
        """The accuracy of whoever sees the current token and its position, but nothing before it."""
        return 1 / self.answers

    def check(self, length: int) -> None:
        if length < self.shortest:
            raise UserError(f"{self.name} needs at least {self.shortest} tokens, and {length} were given: give more")
        if self.longest is not None and length > self.longest:
            raise UserError(
                f"{self.name} has symbols for {self.longest} tokens at most, and {length} were given: give fewer"
            )

    def sequences(self, seed: int, step: int, count: int, length: int) -> Sequences:
        """A pure function of its arguments; the first rows of a larger batch are the rows of a smaller one."""
        self.check(length)
        # raw counter output, because NumPy promises that stream, but not its distributions, to be stable for ever
        raw = np.random.Philox(key=np.array([seed, step], np.uint64)).random_raw(count * (2 * length + len(MANY)))
        return self.make(Dice(raw.reshape(count, -1)), length)

    def held_out(self, count: int, length: int) -> Sequences:
        """Always the same sequences, in a stream that no training seed reaches."""
        return self.sequences(HELD_OUT, length, count, length)


def _blank(rows: int, length: int) -> Sequences:
    return np.zeros((rows, length), np.int64), np.full((rows, length), -1)


def _recall(dice: Dice, length: int) -> Sequences:
    """length / 8 pairs of key and value; from then on every token is one of the keys, and its value is asked."""
    pairs = length // 8
    tokens, targets = _blank(dice.rows, length)
    keys, values = KEY + dice.chosen(len(KEYS), pairs), LETTER + dice.below(len(LETTERS), pairs)
    tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2] = keys, values
    asked = dice.below(pairs, length - 2 * pairs)
    tokens[:, 2 * pairs :] = np.take_along_axis(keys, asked, 1)
    targets[:, 2 * pairs :] = np.take_along_axis(values, asked, 1)
    return tokens, targets


def _induction(dice: Dice, length: int, symbols: str = MANY) -> Sequences:
    """Different symbols in blocks of 4, then the same blocks in another order: what followed, follows again."""
    blocks = length // (2 * BLOCK)
    half = blocks * BLOCK
    tokens, targets = _blank(dice.rows, length)
    first = 1 + dice.chosen(len(symbols), half).reshape(dice.rows, blocks, BLOCK)
    second = np.take_along_axis(first, dice.chosen(blocks, blocks)[:, :, None], 1)
    following = np.full_like(second, -1)
    following[:, :, :-1] = second[:, :, 1:]  # which block comes next cannot be known, and is not asked
    tokens[:, :half], tokens[:, half : 2 * half] = (part.reshape(dice.rows, half) for part in (first, second))
    targets[:, half : 2 * half] = following.reshape(dice.rows, half)
    return tokens, targets


def _copying(dice: Dice, length: int) -> Sequences:
    """Random letters, a mark, and the same letters once more."""
    count = length // 2
    tokens, targets = _blank(dice.rows, length)
    letters = LETTER + dice.below(len(LETTERS), count)
    tokens[:, :count], tokens[:, count], tokens[:, count + 1 : 2 * count] = letters, MARKED, letters[:, :-1]
    targets[:, count : 2 * count] = letters
    return tokens, targets


def _selective(dice: Dice, length: int) -> Sequences:
    """length / 8 letters lost in noise, then as many marks: at the n-th mark the n-th letter is asked."""
    count = length // 8
    tokens, targets = _blank(dice.rows, length)
    letters = LETTER + dice.below(len(LETTERS), count)
    np.put_along_axis(tokens, np.sort(dice.chosen(length - count, count), axis=1), letters, 1)
    tokens[:, length - count :], targets[:, length - count :] = MARKED, letters
    return tokens, targets


def _needle(dice: Dice, length: int) -> Sequences:
    """2 keys, each with its value, at any depth of a haystack of other keys and values; the last quarter asks."""
    hay = length - length // 4
    tokens, targets = _blank(dice.rows, length)
    keys, values = dice.chosen(len(KEYS), len(KEYS)), LETTER + dice.below(len(LETTERS), NEEDLES)
    straw = dice.below(len(LETTERS) + len(KEYS) - NEEDLES, hay)
    other = np.take_along_axis(keys, np.maximum(straw - len(LETTERS), 0) + NEEDLES, 1)
    tokens[:, :hay] = np.where(straw < len(LETTERS), LETTER + straw, KEY + other)
    needles = KEY + keys[:, :NEEDLES]
    places = 2 * dice.chosen((hay - 1) // 2, NEEDLES) + dice.below(2, 1)
    np.put_along_axis(tokens, places, needles, 1)
    np.put_along_axis(tokens, places + 1, values, 1)
    asked = dice.below(NEEDLES, length - hay)
    tokens[:, hay:] = np.take_along_axis(needles, asked, 1)
    targets[:, hay:] = np.take_along_axis(values, asked, 1)
    return tokens, targets


def _needle_depth(tokens: np.ndarray) -> np.ndarray:
    hay = tokens.shape[1] - tokens.shape[1] // 4
    return (tokens[:, None, :hay] == tokens[:, hay:, None]).argmax(2) / (hay - 2)


TASKS = {
    task.name: task
    for task in (
        Task(
            "mqar",
            "Multi-query associative recall (Arora et al. 2023, arXiv 2312.04927): what value came with this key?",
            NOISE + LETTERS + KEYS,
            len(LETTERS),
            _recall,
            longest=8 * len(KEYS),
        ),
        Task(
            "induction",
            "Induction (Olsson et al. 2022, arXiv 2209.11895): what followed this symbol the last time?",
            NOISE + MANY,
            len(MANY) - 1,
            _induction,
            shortest=2 * BLOCK,
            longest=2 * len(MANY),
        ),
        Task(
            "repeats",
            "Induction among 64 symbols instead of 256, learnt in a third of the time: what followed the last time?",
            NOISE + FEW,
            len(FEW) - 1,
            partial(_induction, symbols=FEW),
            shortest=2 * BLOCK,
            longest=2 * len(FEW),
        ),
        Task(
            "copying",
            "Copying (Jelassi et al. 2024, arXiv 2402.01032): the whole text again, letter by letter.",
            NOISE + LETTERS + MARK,
            len(LETTERS),
            _copying,
        ),
        Task(
            "selective",
            "Selective copying (Gu and Dao 2023, arXiv 2312.00752): the letters again, without the noise between them.",
            NOISE + LETTERS + MARK,
            len(LETTERS),
            _selective,
        ),
        Task(
            "needle",
            "Needle in a haystack: the value of a key that stands once in a text full of other keys and values.",
            NOISE + LETTERS + KEYS,
            len(LETTERS),
            _needle,
            depth=_needle_depth,
        ),
    )
}


def task(name: str) -> Task:
    return TASKS[choose("task", name, TASKS)]


def task_of(config: DataConfig) -> Task | None:
    """The task that a run trains on, if it is one."""
    kind, _, name = config.source.partition(":")
    return task(name) if kind == "task" else None
