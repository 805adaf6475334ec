"""The cache: what it holds, forgets, forks, rewinds and writes to disk. The laws test it under every mechanism; these
are the cases that need no mechanism."""

import pytest
import torch

from attnlab import attention, cache
from attnlab.cache import Cache, extend
from attnlab.errors import UserError
from attnlab.ops import chunk_sums, ema, newest, rope
from attnlab.spec import CAUSAL, CacheSpec, Mask

TOKEN = CacheSpec({"k": (3,)})


def rows(positions):
    """Rows that say which position they are."""
    return positions[..., None].expand(-1, -1, 3).double()


def feed(store, positions, **kwargs):
    positions = torch.as_tensor(positions)
    return extend(store, positions, k=rows(positions), **kwargs)


@pytest.mark.parametrize("ragged", [True, False])
def test_a_step_reads_what_is_held_and_not_the_capacity(ragged):
    store = Cache.empty(TOKEN, 2, 1000, ragged=ragged, dtype=torch.float64)
    seen, store = feed(store, [[0, 1, 2]] * 2)
    seen, store = feed(store, [[3]] * 2)
    assert seen.rows["k"].shape == (2, 4, 3)
    assert seen.rows["k"].data_ptr() == store.rows["k"].data_ptr()  # a view, not a copy
    assert store.floats() == 2 * 4 * 3


@pytest.mark.parametrize("ragged", [True, False])
@pytest.mark.parametrize("chunks", [[17], [1] * 17, [3, 1, 9, 4], [5, 5, 5, 2]], ids=str)
def test_a_ring_shows_each_query_its_window(ragged, chunks):
    store = Cache.empty(CacheSpec({"k": (3,)}, keep=5), 2, 100, ragged=ragged, dtype=torch.float64)
    window = Mask(window=5)
    for part in torch.arange(17).expand(2, 17).split(chunks, 1):
        seen, store = feed(store, part)
        for b in range(2):
            for q in part[b]:
                visible = window(q, seen.positions[b])
                found = sorted(seen.rows["k"][b, visible, 0].tolist())
                assert found == list(range(max(0, int(q) - 4), int(q) + 1))
    assert store.floats() == 2 * 5 * 3
    assert store.allocated_bytes() == 2 * (5 + ragged) * 3 * 8


def test_padding_takes_no_room():
    store = Cache.empty(TOKEN, 2, 6, dtype=torch.float64)
    seen, store = feed(store, [[-1, -1, 0, 1], [0, 1, 2, 3]])
    seen, store = feed(store, [[2, 3, 4], [-1, 4, 5]])
    assert store.floats() == (5 + 6) * 3
    for b, length in enumerate((5, 6)):
        real = CAUSAL(torch.tensor(99), seen.positions[b])
        assert sorted(seen.rows["k"][b, real, 0].tolist()) == list(range(length))


@pytest.mark.parametrize("ragged", [True, False])
def test_a_full_cache_says_so(ragged):
    _, store = feed(Cache.empty(TOKEN, 1, 4, ragged=ragged, dtype=torch.float64), [[0, 1, 2]])
    with pytest.raises(UserError, match="room for 4 tokens and 5 are needed"):
        feed(store, [[3, 4]])
    ring = Cache.empty(CacheSpec({"k": (3,)}, keep=8), 1, 4, ragged=ragged, dtype=torch.float64)
    _, ring = feed(ring, [[0, 1, 2, 3]])
    with pytest.raises(UserError, match="room for 4"):
        feed(ring, [[4]])


def test_a_fork_shares_nothing_and_a_rewind_forgets():
    _, store = feed(Cache.empty(TOKEN, 1, 9, dtype=torch.float64), [[0, 1, 2, 3]])
    fork = store.fork()
    feed(store, [[4, 5]])
    assert fork.floats() == 4 * 3 and (fork.positions[:, 4:] == -1).all()
    back = store.rewind(2)
    seen, back = feed(back, [[2]])
    assert seen.positions.tolist() == [[0, 1, 2]]
    with pytest.raises(UserError, match="cannot rewind to 7 tokens"):
        back.rewind(7)
    with pytest.raises(UserError, match="only the last 5 tokens"):
        Cache.empty(CacheSpec({"k": (3,)}, keep=5), 1, 9).rewind(0)


@pytest.mark.parametrize("name", attention.names())
def test_a_cache_can_be_widened_made_ragged_and_put_in_another_order(name):
    torch.manual_seed(0)
    layer = attention.build(name, d_model=24, n_heads=4, head_dim=8).double().eval()
    x, positions = torch.randn(3, 41, 24, dtype=torch.float64), torch.arange(41).expand(3, -1)
    whole, _ = layer(x, positions)
    store = Cache.empty(layer.config.cache_spec, 3, 5, ragged=False, dtype=torch.float64)
    order = torch.tensor([2, 0, 0])
    with torch.no_grad():
        for start, stop, ragged in ((0, 5, False), (5, 17, False), (17, 18, True), (18, 41, True)):
            store = store.widened(stop, ragged=ragged)
            y, store = layer(x[:, start:stop], positions[:, start:stop], store)
            torch.testing.assert_close(y, whole[:, start:stop])
            x, whole = x[order], whole[order]
            store = store.each(lambda t: t.index_select(0, order))
    assert store.floats() == 3 * layer.config.cache_spec.floats(41)


@pytest.mark.parametrize("name", attention.names())
def test_a_saved_cache_goes_on_where_it_was(name, tmp_path):
    torch.manual_seed(0)
    m = attention.build(name).double().eval()
    x, positions = torch.randn(2, 21, 64).double(), torch.arange(21).expand(2, 21)
    with torch.no_grad():
        store = Cache.empty(m.config.cache_spec, 2, 30, dtype=torch.float64)
        _, store = m(x[:, :18], positions[:, :18], store)
        (again,) = cache.load_cache(cache.save_cache([store], tmp_path / "prompt.safetensors"))
        want, _ = m(x[:, 18:], positions[:, 18:], store)
        got, after = m(x[:, 18:], positions[:, 18:], again)
    assert torch.equal(got, want)
    assert after.floats() == 2 * m.config.cache_spec.floats(21)


def test_a_damaged_cache_file_is_one_sentence(tmp_path):
    path = tmp_path / "prompt.safetensors"
    with pytest.raises(UserError, match="no cache file"):
        cache.load_cache(path)
    cache.save_cache([Cache.empty(TOKEN, 1, 9)], path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="not a whole cache file"):
        cache.load_cache(path)


@pytest.mark.parametrize("shape", [(2, 1), (2, 15), (2, 16), (2, 17), (1, 100)])
def test_ema_is_the_recurrence(shape):
    torch.manual_seed(0)
    x, start = torch.randn(*shape, 6).double(), torch.randn(shape[0], 6).double()
    decay = torch.tensor([0.0, 0.1, 0.5, 0.9, 0.999, 1.0]).double()
    positions = torch.arange(shape[1]).expand(shape).clone()
    positions[0, ::3] = -1
    real = 0.05 + 0.95 * decay
    m, want = start, []
    for t in range(shape[1]):
        m = torch.where(positions[:, t : t + 1] >= 0, real * m + (1 - real) * x[:, t], m)
        want.append(m)
    torch.testing.assert_close(ema(x, decay, positions, start), torch.stack(want, 1))


@pytest.mark.parametrize("cut", range(1, 13))
def test_chunk_sums_do_not_care_how_tokens_arrive(cut):
    x = torch.randn(2, 13, 5).double()
    positions = torch.stack([torch.arange(13), torch.arange(13) - 3]).clamp(min=-1)
    carried, found = torch.zeros(2, 5).double(), {}
    for part, at in ((x[:, :cut], positions[:, :cut]), (x[:, cut:], positions[:, cut:])):
        sums, which, carried = chunk_sums(part, at, 4, carried)
        for b in range(2):
            found |= {(b, int(j)): s for j, s in zip(which[b], sums[b], strict=True) if j >= 0}
    want = {(0, j): x[0, 4 * j : 4 * j + 4].sum(0) for j in range(3)}
    want |= {(1, j): x[1, 3 + 4 * j : 7 + 4 * j].sum(0) for j in range(2)}
    assert found.keys() == want.keys()
    for key, value in want.items():
        torch.testing.assert_close(found[key], value)
    torch.testing.assert_close(carried, torch.stack([x[0, 12], x[1, 11:].sum(0)]))


def test_newest_takes_the_highest_and_then_the_latest():
    scores = torch.tensor([[0.0, 2.0, 0.0, 0.0, 1.0, 0.0], [5.0, 0.0, 0.0, 0.0, -torch.inf, -torch.inf]])
    assert newest(scores, 3).int().tolist() == [[0, 1, 0, 0, 1, 1], [1, 0, 1, 1, 0, 0]]
    assert newest(scores, 9).int().tolist() == [[1] * 6, [1, 1, 1, 1, 0, 0]]


def test_rope_turns_pairs_and_keeps_lengths_in_bfloat16_at_large_positions():
    x = torch.randn(1, 3, 2, 8)
    positions = torch.tensor([[0, 1, 30_001]])
    y = rope(x, positions, 10_000.0)
    torch.testing.assert_close(y[:, 0], x[:, 0])
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(rope(x.bfloat16(), positions, 10_000.0).float(), y, atol=0.06, rtol=0.02)


ALONE = CacheSpec({}, state={"matrix": (2, 3)})


@pytest.mark.parametrize("ragged", [True, False])
def test_a_cache_of_state_alone_has_room_for_any_number_of_tokens(ragged, tmp_path):
    store = Cache.empty(ALONE, 2, 3, ragged=ragged, dtype=torch.bfloat16)
    assert store.state["matrix"].dtype == torch.float32
    before = store.allocated_bytes()
    for start in range(0, 4000, 1000):
        seen, store = extend(store, torch.arange(start, start + 1000).expand(2, -1))
        store = store.with_state(matrix=store.state["matrix"] + 1)
    assert store.tokens == 4000 and store.held == seen.positions.shape[1] == 0
    assert store.allocated_bytes() == before == store.nbytes() == 2 * 6 * 4 == 2 * ALONE.nbytes(4000, 2)
    assert store.positions.numel() <= 2
    for same in (
        store.fork(),
        store.widened(9999, ragged=True),
        cache.load_cache(cache.save_cache([store], tmp_path / "c"))[0],
    ):
        assert same.tokens == 4000 and same.state["matrix"].eq(4).all() and same.state["matrix"].dtype == torch.float32
    with pytest.raises(UserError, match="it keeps a running state; fork it before"):
        store.rewind(1)


def test_a_saved_cache_with_a_narrow_state_is_read_in_float32(tmp_path):
    """As older versions wrote it: state in the cache's dtype, and positions for every token."""
    old = Cache.empty(ALONE, 2, 3, dtype=torch.bfloat16)
    old = cache.replace(
        old, state={"matrix": torch.ones(2, 2, 3).bfloat16()}, positions=torch.full((2, 4), -1), capacity=3, tokens=3
    )
    (new,) = cache.load_cache(cache.save_cache([old], tmp_path / "c"))
    assert new.state["matrix"].dtype == torch.float32 and new.tokens == 3
    _, new = extend(new, torch.arange(3, 9).expand(2, -1))
    assert new.tokens == 9


def test_bytes_count_rows_in_the_cache_s_dtype_and_state_in_its_own():
    spec = CacheSpec({"k": (3,)}, state={"s": (5,)}, beside={"x": CacheSpec({"m": (2,)}, every=2, state={"t": (1,)})})
    store = Cache.empty(spec, 1, 4, dtype=torch.bfloat16)
    assert spec.nbytes(0, 2) == store.nbytes() == 4 * 6
    positions = torch.arange(4)[None]
    _, store = extend(store, positions, k=torch.ones(1, 4, 3))
    _, beside = extend(store.beside["x"], positions[:, :2], 4, m=torch.ones(1, 2, 2))
    store = cache.replace(store, beside={"x": beside})
    assert store.nbytes() == spec.nbytes(4, 2) == 2 * (12 + 4) + 4 * 6 == spec.read_nbytes(4, 2)
    assert spec.nbytes(4, 8) == 8 * spec.floats(4)
