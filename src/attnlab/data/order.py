"""The order in which training reads its corpus: arithmetic on (seed, place), with nothing held and nothing to resume.

Samples are numbered 0, 1, 2, ... through all steps and epochs. In each epoch a permutation of its own, computed where
it is asked for, takes every sample to a unit of the corpus (a window, or a row of documents), so each unit is read
exactly once. All of it is whole-number arithmetic on 64 bits, and pinned by tests: the order must never change.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

ROUNDS = 8
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: consecutive numbers become far-apart ones
SHARE = 20  # bits of a mixture's weight


def mix(x: np.ndarray) -> np.ndarray:
    """A hash of uint64 to uint64, one to one: the finaliser of splitmix64 (Steele, Lea, Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def key_of(*numbers: int) -> np.ndarray:
    """uint64 [1]: one key for several whole numbers below 2^64, such as a seed and the number of a corpus."""
    key = np.zeros(1, np.uint64)
    for number in numbers:
        key = mix(key + np.array([number], np.uint64) + GOLDEN)
    return key


def permuted(index: np.ndarray, size: int, key: np.ndarray) -> np.ndarray:
    """Where the permutation of 0 .. size - 1 that belongs to `key` takes each `index`; both uint64 [n].

    A Feistel network permutes the next larger power of 4, at least 64, below which its orders are not equally likely.
    What it takes out of range goes round again until it is back (cycle walking, Black and Rogaway 2002): still one to
    one.
    """
    half = np.uint64(max(3, ((size - 1).bit_length() + 1) // 2))
    at, out = index.copy(), np.arange(len(index))
    while len(out):
        at[out] = _feistel(at[out], half, key[out])
        out = out[at[out] >= size]
    return at


def _feistel(x: np.ndarray, half: np.uint64, key: np.ndarray) -> np.ndarray:
    low = (np.uint64(1) << half) - np.uint64(1)
    left, right = x >> half, x & low
    for turn in range(ROUNDS):
        left, right = right, left ^ (mix(right + mix(key + np.uint64(turn))) & low)
    return left << half | right


def units(samples: np.ndarray, size: int, key: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each sample: the unit (0 .. size - 1) it reads, and the key of its epoch. All uint64 [n]."""
    epoch, index = np.divmod(samples.astype(np.uint64), np.uint64(size))
    keys = mix(key + epoch * GOLDEN)
    return permuted(index, size, keys), keys


def window_starts(samples: np.ndarray, tokens: int, context: int, key: np.ndarray) -> np.ndarray:
    """int64 [n]: where each sample's window of `context` + 1 tokens begins in a row of `tokens`.

    The windows of an epoch lie side by side, each beginning with the last target of the one before. They begin at a
    random offset, drawn for the epoch, so that their edges move; what this leaves out at the ends, less than two
    windows, is other tokens in every epoch.
    """
    size = max(1, tokens // context - 1)
    unit, keys = units(samples, size, key)
    offset = mix(keys) % np.uint64(tokens - size * context)
    return (offset + unit * np.uint64(context)).astype(np.int64)


def shares(samples: np.ndarray, weights: Sequence[float]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each corpus of a mixture: which of `samples` (int64 [n]) are its own, and their numbers among its own.

    The first corpus takes samples as evenly as its weight allows, the second what it should of those left, and so on:
    at every moment each has had its share to within a sample or two, and each goes through its own epochs in order.
    """
    found = []
    rows, left = np.arange(len(samples)), samples.astype(np.uint64)
    for i, weight in enumerate(weights[:-1]):
        part = np.uint64(max(1, round(2**SHARE * weight / sum(weights[i:]))))
        before, after = ((left + np.uint64(k)) * part >> np.uint64(SHARE) for k in (0, 1))
        taken = after > before
        found.append((rows[taken], before[taken]))
        rows, left = rows[~taken], (left - before)[~taken]
    return [*found, (rows, left)]
