"""Synthetic tasks: what was seen must be found again, which tells mechanisms apart where a loss on text does not.

Each sequence is made of random numbers that (seed, step) alone decide, so there are as many as are asked for. Held-out
ones come from a stream that no training seed reaches. Which value belongs to which key is drawn anew for each sequence,
so no answer can be memorised. A target of -1 is a place where nothing is asked.

Every answer follows from earlier tokens. The current token and its position leave all answers equally likely, and the
number of answers gives the level of chance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from ..config import DataConfig
from ..errors import UserError, choose
from ..ranges import checked

HELD_OUT = 2**63  # seeds stay below it

# Symbols are characters, so that a sequence can be read; a token's id is the place of its character among them.
NOISE = "."
LETTERS = "abcdefghijklmnopqrstuvwxyz"
MARK = "|"
KEYS = "".join(map(chr, range(0x410, 0x450)))  # Cyrillic
MANY = "".join(map(chr, range(0x100, 0x200)))
FEW = MANY[:64]
# Ids, where they stand in the alphabets below: noise, letters, and then the mark or the keys.
FIRST_LETTER = 1
MARK_ID = 1 + len(LETTERS)
FIRST_KEY = 1 + len(LETTERS)
SYMBOLS_PER_BLOCK = 4  # of induction
NEEDLES = 2


class Dice:
    """The random numbers of some sequences, uint64 [rows, many], used up from left to right."""

    def __init__(self, raw: np.ndarray):
        self.raw = raw
        self.used = 0

    @property
    def rows(self) -> int:
        """The number of sequences."""
        return len(self.raw)

    def below(self, limit: int, count: int) -> np.ndarray:
        """Return `count` numbers per sequence, each from 0 to limit - 1: int64 [rows count]."""
        return (self._take(count) % np.uint64(limit)).astype(np.int64)

    def chosen(self, many: int, count: int) -> np.ndarray:
        """Return `count` different ones of 0 .. many - 1 per sequence, in random order: int64 [rows count]."""
        return self._take(many).argsort(axis=1, kind="stable")[:, :count]

    def _take(self, count: int) -> np.ndarray:
        self.used += count
        assert self.used <= self.raw.shape[1], "a sequence needs more random numbers than it was given"
        return self.raw[:, self.used - count : self.used]


Sequences = tuple[np.ndarray, np.ndarray]  # tokens and targets, [rows length]


@dataclass(frozen=True)
class Task:
    """A task: its symbols, and the function that makes its sequences."""

    name: str
    tests: str  # the question, in a sentence, with its source
    symbols: str  # the alphabet, in ascending order
    answers: int  # number of answers that are equally likely, given the current token alone
    make: Callable[[Dice, int], Sequences]  # (random numbers, length) -> sequences
    shortest: int = 8  # tokens that a sequence needs
    longest: int | None = None  # tokens that the symbols suffice for; None: any number
    depth: Callable[[np.ndarray], np.ndarray] | None = None  # tokens -> depth of each answer, from 0 (start) to 1

    @property
    def chance(self) -> float:
        """The accuracy of a reader of the current token and its position, who sees nothing before it."""
        return 1 / self.answers

    def check(self, length: int) -> None:
        """Raise UserError where a sequence cannot have this length, in tokens."""
        if length < self.shortest:
            raise UserError(f"{self.name} needs at least {self.shortest} tokens, and {length} were given: give more")
        if self.longest is not None and length > self.longest:
            raise UserError(
                f"{self.name} has symbols for {self.longest} tokens at most, and {length} were given: give fewer"
            )

    def sequences(self, seed: int, step: int, count: int, length: int) -> Sequences:
        """Return `count` sequences of `length` tokens.

        A pure function of its arguments. The first rows of a larger batch are the rows of a smaller one.
        """
        self.check(length)
        # raw counter output, because NumPy promises that stream, but not its distributions, to be stable for ever
        raw = np.random.Philox(key=np.array([seed, step], np.uint64)).random_raw(count * (2 * length + len(MANY)))
        return self.make(Dice(raw.reshape(count, -1)), length)

    def held_out(self, count: int, length: int) -> Sequences:
        """Return sequences to test on: always the same, from a stream that no training seed reaches."""
        return self.sequences(HELD_OUT, length, count, length)


def _blank(rows: int, length: int) -> Sequences:
    return np.zeros((rows, length), np.int64), np.full((rows, length), -1)


def _recall(dice: Dice, length: int) -> Sequences:
    """Return length / 8 pairs of key and value; then every token is one of the keys, and its value is asked."""
    pairs = length // 8
    tokens, targets = _blank(dice.rows, length)
    keys = FIRST_KEY + dice.chosen(len(KEYS), pairs)
    values = FIRST_LETTER + dice.below(len(LETTERS), pairs)
    tokens[:, 0 : 2 * pairs : 2] = keys
    tokens[:, 1 : 2 * pairs : 2] = values
    asked = dice.below(pairs, length - 2 * pairs)
    tokens[:, 2 * pairs :] = np.take_along_axis(keys, asked, 1)
    targets[:, 2 * pairs :] = np.take_along_axis(values, asked, 1)
    return tokens, targets


def _induction(dice: Dice, length: int, symbols: str = MANY) -> Sequences:
    """Return different symbols in blocks of 4, then the same blocks in another order: what followed, follows again."""
    blocks = length // (2 * SYMBOLS_PER_BLOCK)
    half = blocks * SYMBOLS_PER_BLOCK
    tokens, targets = _blank(dice.rows, length)
    first = 1 + dice.chosen(len(symbols), half).reshape(dice.rows, blocks, SYMBOLS_PER_BLOCK)
    second = np.take_along_axis(first, dice.chosen(blocks, blocks)[:, :, None], 1)
    following = np.full_like(second, -1)
    following[:, :, :-1] = second[:, :, 1:]  # which block comes next cannot be known, and is not asked
    tokens[:, :half] = first.reshape(dice.rows, half)
    tokens[:, half : 2 * half] = second.reshape(dice.rows, half)
    targets[:, half : 2 * half] = following.reshape(dice.rows, half)
    return tokens, targets


def _copying(dice: Dice, length: int) -> Sequences:
    """Return random letters, a mark, and the same letters once more."""
    count = length // 2
    tokens, targets = _blank(dice.rows, length)
    letters = FIRST_LETTER + dice.below(len(LETTERS), count)
    tokens[:, :count] = letters
    tokens[:, count] = MARK_ID
    tokens[:, count + 1 : 2 * count] = letters[:, :-1]
    targets[:, count : 2 * count] = letters
    return tokens, targets


def _selective(dice: Dice, length: int) -> Sequences:
    """Return length / 8 letters scattered in noise, then as many marks: at the n-th the n-th letter is asked."""
    count = length // 8
    tokens, targets = _blank(dice.rows, length)
    letters = FIRST_LETTER + dice.below(len(LETTERS), count)
    places = np.sort(dice.chosen(length - count, count), axis=1)
    np.put_along_axis(tokens, places, letters, 1)
    tokens[:, length - count :] = MARK_ID
    targets[:, length - count :] = letters
    return tokens, targets


def _needle(dice: Dice, length: int) -> Sequences:
    """Return 2 keys, each with its value, at any depth among other keys and values; the last quarter asks.

    The first NEEDLES keys of a random order are the needles; the others, and all letters, are the haystack.
    """
    hay = length - length // 4
    tokens, targets = _blank(dice.rows, length)
    keys = dice.chosen(len(KEYS), len(KEYS))
    values = FIRST_LETTER + dice.below(len(LETTERS), NEEDLES)
    straw = dice.below(len(LETTERS) + len(KEYS) - NEEDLES, hay)
    other = np.take_along_axis(keys, np.maximum(straw - len(LETTERS), 0) + NEEDLES, 1)
    tokens[:, :hay] = np.where(straw < len(LETTERS), FIRST_LETTER + straw, FIRST_KEY + other)
    needles = FIRST_KEY + keys[:, :NEEDLES]
    places = 2 * dice.chosen((hay - 1) // 2, NEEDLES) + dice.below(2, 1)
    np.put_along_axis(tokens, places, needles, 1)
    np.put_along_axis(tokens, places + 1, values, 1)
    asked = dice.below(NEEDLES, length - hay)
    tokens[:, hay:] = np.take_along_axis(needles, asked, 1)
    targets[:, hay:] = np.take_along_axis(values, asked, 1)
    return tokens, targets


def _needle_depth(tokens: np.ndarray) -> np.ndarray:
    """Return where the key of each question stands, from 0 at the start to 1 at the end of the haystack."""
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
            shortest=2 * SYMBOLS_PER_BLOCK,
            longest=2 * len(MANY),
        ),
        Task(
            "repeats",
            "Induction among 64 symbols instead of 256, learnt in a third of the time: what followed the last time?",
            NOISE + FEW,
            len(FEW) - 1,
            partial(_induction, symbols=FEW),
            shortest=2 * SYMBOLS_PER_BLOCK,
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


@checked
def task(name: str) -> Task:
    """Return the task of this name. UserError where there is none."""
    return TASKS[choose("task", name, TASKS)]


def task_of(config: DataConfig) -> Task | None:
    """Return the task that a run trains on; None where it trains on text."""
    kind, _, name = config.source.partition(":")
    return task(name) if kind == "task" else None
