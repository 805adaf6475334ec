"""The order of the data: one to one, without memory, and the same for ever."""

from __future__ import annotations

from collections import Counter
from math import factorial

import numpy as np
import pytest

from attnlab.data.order import GOLDEN, key_of, mix, shares, shuffled, spread_places, units, window_starts

PINNED = {
    "mix": [0, 6238072747940578789, 2720858781877447050],
    "key": [16294208416658607535, 2875738036014693257],
    "ten": [0, 2, 3, 6, 8, 9, 4, 1, 5, 7],
    "billion": [316483045, 135748343, 985353007],
    "windows": [224, 507, 183, 991, 860],
    "places": [176, 286, 405, 794, 821],
}


def order(size: int, *key: int, count: int | None = None) -> np.ndarray:
    index = np.arange(size if count is None else count, dtype=np.uint64)
    return shuffled(index, size, key_of(*key).repeat(len(index)))


def test_every_size_is_permuted_one_to_one():
    for size in (*range(1, 301), 4095, 4096, 4097, 100_003):
        assert sorted(order(size, size).tolist()) == list(range(size))


@pytest.mark.parametrize("size", [2**32 - 1, 2**40 + 7, 10**13])
def test_large_sizes_stay_in_range_and_do_not_collide(size):
    index = np.random.default_rng(0).integers(0, size, 50_000).astype(np.uint64)
    found = shuffled(index, size, key_of(3).repeat(len(index)))
    assert found.max() < size and len(np.unique(found)) == len(np.unique(index))
    assert abs(found.mean() / size - 0.5) < 0.01


def test_the_order_is_pinned():
    """Runs are compared across machines and years: these numbers must never change."""
    assert mix(np.array([0, 1, 2**63], np.uint64)).tolist() == PINNED["mix"]
    assert [*key_of(0).tolist(), *key_of(7, 1).tolist()] == PINNED["key"]
    assert order(10, 0).tolist() == PINNED["ten"]
    assert order(10**9, 5, count=3).tolist() == PINNED["billion"]
    samples = np.array([0, 1, 97, 98, 10**6])
    assert window_starts(samples, 1000, 10, key_of(1).repeat(5)).tolist() == PINNED["windows"]
    assert spread_places(5, 1000).tolist() == PINNED["places"]


def test_the_hash_is_splitmix64s():
    """Its published first outputs for the seed 1234567: the hash of the seed plus 1, 2, ... steps."""
    steps = np.uint64(1234567) + np.arange(1, 6, dtype=np.uint64) * GOLDEN
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert mix(steps).tolist() == [*published, 16408922859458223821]


def test_all_orders_of_a_few_are_equally_likely():
    keys = mix(np.arange(24_000, dtype=np.uint64) * GOLDEN)
    for size in (2, 3, 4, 5):
        orders = np.stack([shuffled(np.full(len(keys), i, np.uint64), size, keys) for i in range(size)], 1)
        seen, kinds = Counter(map(tuple, orders.tolist())), factorial(size)
        assert len(seen) == kinds
        chi = sum((count - len(keys) / kinds) ** 2 for count in seen.values()) * kinds / len(keys)
        assert chi < (kinds - 1) + 5 * (2 * (kinds - 1)) ** 0.5


def test_an_order_looks_random():
    """No correlation with the index, with the neighbour, or with the order of another seed or epoch."""
    size = 20_000
    one, other = order(size, 1).astype(float), order(size, 2).astype(float)
    (next_epoch, _) = units(np.arange(size, 2 * size), size, key_of(1).repeat(size))
    index = np.arange(size)
    for a, b in ((index, one), (one[:-1], one[1:]), (one[:-7], one[7:]), (one, other), (one, next_epoch)):
        assert abs(np.corrcoef(a, b.astype(float))[0, 1]) < 5 / size**0.5
    jumps = np.abs(np.diff(one)) / size  # of random pairs, the mean distance is 1/3
    assert abs(jumps.mean() - 1 / 3) < 0.01
    assert abs((one[: size // 10] < size // 2).mean() - 0.5) < 0.05


@pytest.mark.parametrize(
    "tokens, context", [(11, 10), (19, 10), (20, 10), (29, 10), (30, 10), (31, 10), (1000, 7), (977, 16), (5280, 40)]
)
def test_an_epoch_reads_each_token_once_but_for_less_than_two_windows(tokens, context):
    size = max(1, tokens // context - 1)
    samples = np.arange(200 * size)
    starts = window_starts(samples, tokens, context, key_of(4).repeat(len(samples)))
    assert starts.min() >= 0 and starts.max() + 1 < tokens  # each has something to predict
    read = np.zeros((200, tokens), int)
    for epoch, row in zip(read, starts.reshape(200, size), strict=True):
        for start in row.tolist():
            epoch[start : min(start + context, tokens - 1)] += 1
    assert read.max() == 1
    assert (tokens - 1 - read.sum(1)).max() < 2 * context - (size > 1)
    assert (read[:, :-1].sum(0) > 0).all()  # and what one leaves out, others read
    assert len(set(starts.reshape(200, size).min(1).tolist())) > min(5, (tokens - context) // 2)  # its edges move
    alone = [window_starts(np.array([i]), tokens, context, key_of(4))[0] for i in samples[-5:]]
    assert alone == starts[-5:].tolist()  # and what is asked together does not matter


@pytest.mark.parametrize("size, context", [(1500, 40), (90, 40), (60, 40), (40, 40), (27, 40), (8, 40), (5000, 17)])
@pytest.mark.parametrize("rest", [0, 1, 23])
def test_windows_begin_at_every_place_of_a_period(size, context, rest):
    """In every epoch as often as its length allows, whether the period divides the context or not."""
    tokens = (size + 1) * context + min(rest, context - 1)
    epochs = 50
    samples = np.arange(epochs * size)
    starts = window_starts(samples, tokens, context, key_of(9).repeat(len(samples)))
    for period in (2, 3, 4, 5, 8, 10, 20, context):
        seen = np.bincount(starts % period, minlength=period)
        want = epochs * size / period
        assert ((seen - want) ** 2 / want).sum() < period + 6 * (2 * period) ** 0.5, period
        if size > 10 * context:  # already in one epoch, and nearly in any part of it
            one = np.bincount(starts[:size] % period, minlength=period)
            assert np.abs(one - size / period).max() < 3 + size / 20 / period


def test_the_places_of_a_validation_are_spread_and_have_no_period():
    for count, size in ((1, 1), (1, 50), (7, 3), (240, 59_959), (240, 239 * 250 + 1), (24, 24 * 10 * 2**17), (50, 50)):
        places = spread_places(count, size)
        assert places.tolist() == spread_places(count, size).tolist() and 0 <= places.min() <= places.max() < size
        parts = places * count // size if size >= count else np.arange(count)
        assert np.abs(parts - np.arange(count)).max() <= (size < 1000)  # one from each part
        if size > 10 * count:
            assert count < 10 or len(set((places % 10).tolist())) > 7


@pytest.mark.parametrize("weights", [(1.0,), (0.7, 0.3), (1.0, 1.0, 1.0), (5.0, 0.1, 2.0), (1e-3, 1.0)])
def test_a_mixture_takes_its_share_at_every_moment(weights):
    count = 30_000
    found = shares(np.arange(count), weights)
    assert sorted(np.concatenate([rows for rows, _ in found]).tolist()) == list(range(count))
    for weight, (rows, own) in zip(weights, found, strict=True):
        assert own.tolist() == list(range(len(own)))  # none is left out: each goes through its own order
        taken = np.searchsorted(rows, np.arange(count + 1))
        assert np.abs(taken - np.arange(count + 1) * weight / sum(weights)).max() < len(weights)
    for (rows, own), (late, at) in zip(found, shares(np.arange(20_000, 20_050), weights), strict=True):
        inside = (rows >= 20_000) & (rows < 20_050)
        assert (late + 20_000).tolist() == rows[inside].tolist() and at.tolist() == own[inside].tolist()
