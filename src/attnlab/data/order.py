"""The order in which training reads its corpus: arithmetic on (seed, place), with nothing held and nothing to resume.

sample  one row of a batch. Samples are numbered 0, 1, 2, ... through all steps and epochs.
unit    what one sample reads: a window of the corpus, or a row of documents

In each epoch a permutation of its own takes every sample to a unit, so each unit is read exactly once. The permutation
is computed where it is asked for. All of it is whole-number arithmetic on 64 bits, and pinned by tests: the order of a
VERSION must never change.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

VERSION = 2  # of the order; a run goes on with the one it began with, or not at all (1: windows of one phase)
ROUNDS = 8  # of the Feistel network
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: consecutive numbers become far-apart ones
SHARE = 20  # bits of a mixture's weight
FINE = 16  # bits of a place between two whole numbers; a corpus has fewer than 2^(64 - FINE) tokens


def mix(x: np.ndarray) -> np.ndarray:
    """Return a hash of uint64 to uint64, one to one: the finaliser of splitmix64 (Steele, Lea, Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def key_of(*numbers: int) -> np.ndarray:
    """Return one key for several whole numbers below 2^64, such as a seed and the number of a corpus: uint64 [1]."""
    key = np.zeros(1, np.uint64)
    for number in numbers:
        key = mix(key + np.array([number], np.uint64) + GOLDEN)
    return key


def shuffled(index: np.ndarray, size: int, key: np.ndarray) -> np.ndarray:
    """Return where the permutation of 0 .. size - 1 that belongs to `key` takes each `index`; all uint64 [n].

    A Feistel network permutes the next larger power of 4, at least 64, below which its orders are not equally likely.
    What it takes out of range goes round again until it is back (cycle walking, Black and Rogaway 2002): still one to
    one.
    """
    half = np.uint64(max(3, ((size - 1).bit_length() + 1) // 2))  # bits of half a number
    at = index.copy()
    outside = np.arange(len(index))
    while len(outside):
        at[outside] = _feistel(at[outside], half, key[outside])
        outside = outside[at[outside] >= size]
    return at


def _feistel(x: np.ndarray, half: np.uint64, key: np.ndarray) -> np.ndarray:
    low = (np.uint64(1) << half) - np.uint64(1)
    left = x >> half
    right = x & low
    for turn in range(ROUNDS):
        scrambled = left ^ (mix(right + mix(key + np.uint64(turn))) & low)
        left = right
        right = scrambled
    return left << half | right


def units(samples: np.ndarray, size: int, key: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the unit (0 .. size - 1) that each sample reads, and the key of its epoch. All uint64 [n]."""
    epoch, index = np.divmod(samples.astype(np.uint64), np.uint64(size))
    keys = mix(key + epoch * GOLDEN)
    return shuffled(index, size, keys), keys


def window_starts(samples: np.ndarray, tokens: int, context: int, key: np.ndarray) -> np.ndarray:
    """Return where each sample's window of `context` + 1 tokens begins in a row of `tokens`, int64 [n].

    The windows of an epoch follow one another, each beginning with the last target of the one before, or a few tokens
    later. Those gaps add up to one context. So windows begin at every remainder of division by the context equally
    often, and a text with a period, such as lines of one length, is not always read from the same place of the period.

    The first window begins at a random offset below `context`, drawn for the epoch, so that all edges move. The last
    window is shorter than the others where the row ends before it does. What an epoch leaves out, less than two
    windows, is other tokens in every epoch. A row with room for one window has it anywhere.
    """
    size = max(1, tokens // context - 1)
    unit, keys = units(samples, size, key)
    if size == 1:
        return (mix(keys) % np.uint64(tokens - context)).astype(np.int64)
    offset = mix(keys) % np.uint64(context)
    gaps = stratified(unit, size, context, keys) - stratified(np.zeros_like(unit), size, context, keys)
    return (offset + unit * np.uint64(context) + gaps).astype(np.int64)


def stratified(unit: np.ndarray, size: np.ndarray | int, room: int, key: np.ndarray) -> np.ndarray:
    """Return a number below `room` for each unit of 0 .. size - 1; they ascend with the unit. All uint64 [n].

    The range from 0 to `room` has `size` equal parts, and each unit's number is drawn from its own part.
    """
    fine = np.uint64(FINE)
    within = mix(key + (unit + np.uint64(1)) * GOLDEN) >> (np.uint64(64) - fine)
    return ((unit << fine) + within) * np.uint64(room) // (np.asarray(size, np.uint64) << fine)


def spread_places(count: int, size: int) -> np.ndarray:
    """Return `count` places of 0 .. size - 1, always the same, ascending: int64 [count].

    One is drawn from each of `count` equal parts: even steps could be whole periods of a text that has one.
    """
    number = np.arange(count, dtype=np.uint64)
    within = (mix((number + np.uint64(1)) * GOLDEN) >> np.uint64(11)) * 2.0**-53
    return ((number + within) * (size / count)).astype(np.int64).clip(0, size - 1)


def shares(samples: np.ndarray, weights: Sequence[float]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return which of `samples` belong to each corpus of a mixture, int64 [n], and their numbers among its own.

    The first corpus takes samples as evenly as its weight allows, the second what it should of those left, and so on.
    At every moment each has had its share to within a sample or two, and each goes through its own epochs in order.
    """
    found = []
    rows = np.arange(len(samples))
    left = samples.astype(np.uint64)  # numbers of the samples that no corpus has taken yet
    for i, weight in enumerate(weights[:-1]):
        part = np.uint64(max(1, round(2**SHARE * weight / sum(weights[i:]))))
        before = left * part >> np.uint64(SHARE)  # samples that this corpus took before this one
        after = (left + np.uint64(1)) * part >> np.uint64(SHARE)
        taken = after > before
        found.append((rows[taken], before[taken]))
        rows = rows[~taken]
        left = (left - before)[~taken]
    return [*found, (rows, left)]
