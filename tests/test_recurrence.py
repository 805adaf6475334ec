"""The recurrence and the short convolution, against plain loops over tokens in float64."""

import math
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch.nn.functional import normalize
from torch.utils.flop_counter import FlopCounterMode

from attnlab import presets, recurrence
from attnlab.errors import UserError
from attnlab.recording import record_attention
from attnlab.recurrence import recur, recur_flops, short_conv
from attnlab.scan import inverse
from attnlab.training.train import train

SHAPES = [(2, 4, 6, 5), (1, 3, 4, 2), (2, 2, 1, 1)]  # K N H V
FORMS = [("recurrent", 64), ("chunked", 1), ("chunked", 4), ("chunked", 7), ("chunked", 64), ("auto", 8)]
RATES = ("none", "head", "channel")


def drawn(shape, length, rate, delta, seed=0, batch=2):
    """q, k, v, decay, beta, and positions with pads anywhere."""
    K, N, H, V = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    q, k = normal(batch, length, K, H), normalize(normal(batch, length, K, H), dim=-1)
    size = {"none": None, "head": (batch, length, N), "channel": (batch, length, N, H)}[rate]
    decay = None if size is None else -3 * normal(*size).abs()
    beta = normal(batch, length, N).sigmoid() if delta else None
    positions = torch.arange(length).expand(batch, -1).clone()
    positions[normal(batch, length) > 0.6] = -1
    return q, k, normal(batch, length, N, V), decay, beta, positions


def loops(q, k, v, decay, beta, positions, start=None):
    B, L, K, H = q.shape
    N, V = v.shape[2:]
    y = torch.zeros(B, L, N, V, dtype=torch.float64)
    state = torch.zeros(B, N, H, V, dtype=torch.float64) if start is None else start.clone()
    for b in range(B):
        for t in range(L):
            for n in range(N) if positions[b, t] >= 0 else ():
                key, query, value, S = k[b, t, n // (N // K)], q[b, t, n // (N // K)], v[b, t, n], state[b, n].clone()
                if decay is not None:
                    S = S * (decay[b, t, n].exp()[:, None] if decay.ndim == 4 else decay[b, t, n].exp())
                if beta is not None:
                    value = beta[b, t, n] * (value - S.T @ key)
                state[b, n] = S + torch.outer(key, value)
                y[b, t, n] = state[b, n].T @ query
    return y, state


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_form_is_the_recurrence_whatever_pads_hold_and_counts_its_products(shape, rate, delta):
    K, N, H, V = shape
    for length in (1, 2, 7, 21):
        *parts, positions = drawn(shape, length, rate, delta, length)
        start = torch.randn(2, N, H, V, dtype=torch.float64)
        want, last = loops(*parts, positions, start)
        for tensor in filter(lambda t: t is not None, parts):
            tensor[positions < 0] = math.nan
        for mode, chunk in FORMS:
            with FlopCounterMode(display=False) as counter:
                y, state = recur(*parts, positions=positions, start=start, mode=mode, chunk=chunk)
            torch.testing.assert_close(y, want, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(state, last, rtol=1e-10, atol=1e-10)
            told = recur_flops(
                length, N, H, V, shared=K, delta=delta, by_channel=rate == "channel", mode=mode, chunk=chunk
            )
            assert counter.get_total_flops() == 2 * told


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("rate", RATES)
def test_gradients_of_chunks_are_those_of_tokens(rate, delta):
    *parts, positions = drawn((2, 4, 6, 5), 21, rate, delta)
    parts = [None if t is None else t.requires_grad_() for t in parts]
    start = torch.randn(2, 4, 6, 5, dtype=torch.float64, requires_grad=True)
    inputs = [t for t in (*parts, start) if t is not None]
    found = []
    for mode in ("recurrent", "chunked"):
        y, state = recur(*parts, positions=positions, start=start, mode=mode, chunk=8)
        found.append(torch.autograd.grad(y.pow(2).sum() + state.pow(3).sum(), inputs))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("per_token", [-20.0, -1e4, -math.inf, -1e-6])
@pytest.mark.parametrize("rate", ["head", "channel"])
def test_decay_however_strong_neither_overflows_nor_rounds_what_follows_it(rate, per_token):
    """In float32, chunks of 64: every token decays so much, then every eighth token, and mild ones between."""
    for every in (1, 8):
        q, k, v, decay, beta, _ = drawn((2, 2, 16, 8), 128, rate, True)
        strong = decay / 30
        strong[:, ::every] = per_token
        positions = torch.arange(128).expand(2, -1)
        want, last = recur(q, k, v, strong.clamp(min=-700), beta, positions=positions, mode="recurrent")
        parts = [t.float().requires_grad_() for t in (q, k, v, strong, beta)]
        y, state = recur(*parts, positions=positions, mode="chunked", chunk=64)
        assert float((y.detach() - want).abs().max() / want.abs().max()) < 3e-6
        assert float((state.detach() - last).abs().max() / last.abs().max()) < 3e-6
        assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(y.sum(), parts))


def test_the_inverse_of_equal_keys_stays_small_in_float32():
    """All keys alike and beta 1: powers of the triangle reach 10^18, its inverse has ones and minus ones."""
    below = torch.ones(1, 64, 64)
    want = torch.eye(64) - torch.diag(torch.ones(63), -1)
    assert torch.equal(inverse(below)[0], want)


def test_state_and_sums_are_float32_in_bfloat16_and_under_autocast():
    *parts, positions = drawn((2, 4, 6, 5), 21, "head", True)
    parts = [t.bfloat16() for t in parts]
    want, last = loops(*(t.double() for t in parts), positions)
    y, state = recur(*parts, positions=positions)
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    torch.testing.assert_close(state, last.float(), rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = recur(*(t.float() for t in parts), positions=positions)
    torch.testing.assert_close(y, want.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("normalised", [False, True])
def test_a_recorded_map_times_the_values_is_what_is_written(normalised):
    q, k, v, decay, beta, positions = drawn((2, 4, 6, 5), 21, "none" if normalised else "channel", not normalised)
    if normalised:
        q, k = q.exp(), k.exp()
    with record_attention() as maps:
        y, _ = recur(q, k, v, decay, beta, positions=positions, normalised=normalised)
    (weights,) = maps
    torch.testing.assert_close(torch.einsum("bnls,bsnv->blnv", weights, v), y)
    real = (positions >= 0)[:, None].expand(-1, 4, -1)
    assert not normalised or torch.allclose(weights.sum(-1)[real], torch.ones(1, dtype=torch.float64))
    assert normalised or float(weights.min()) < 0


@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("padded", [False, True])
def test_a_short_convolution_passes_pads_over_and_goes_on(padded, taps):
    generator = torch.Generator().manual_seed(taps)
    x = torch.randn(2, 13, 3, generator=generator, dtype=torch.float64)
    weight = torch.randn(taps, 3, generator=generator, dtype=torch.float64)
    positions = torch.arange(13).expand(2, -1)
    if padded:
        positions = torch.where(torch.rand(2, 13, generator=generator) < 0.4, -1, positions)
    want = torch.full_like(x, math.nan)
    for b in range(2):
        line = [torch.zeros(3, dtype=torch.float64)] * (taps - 1)
        for t in range(13):
            if positions[b, t] >= 0:
                line.append(x[b, t])
                want[b, t] = sum(weight[-1 - i] * line[-1 - i] for i in range(taps))
            else:
                x[b, t] = math.nan
    real = positions >= 0
    for cuts in ([13], [5, 1, 7], [1] * 13):
        past, parts = None, []
        for part, where in zip(x.split(cuts, 1), positions.split(cuts, 1), strict=True):
            y, past = short_conv(part, weight, where, past)
            parts.append(y)
        torch.testing.assert_close(torch.cat(parts, 1)[real], want[real])
        assert past.isfinite().all()


def test_pads_in_a_row_that_all_sequences_share_are_seen():
    q, k, v, decay, beta, _ = drawn((2, 4, 6, 5), 6, "head", True)
    positions = torch.tensor([0, -1, 1, 2, -1, 3])
    want, _ = loops(q, k, v, decay, beta, positions.expand(2, -1))
    y, _ = recur(q, k, v, decay, beta, positions=positions.expand(2, -1))
    torch.testing.assert_close(y, want)
    x = torch.randn(2, 6, 3, dtype=torch.float64)
    alone, _ = short_conv(x[:, positions >= 0], torch.ones(3, 3).double(), torch.arange(4).expand(2, -1))
    y, _ = short_conv(x, torch.ones(3, 3).double(), positions.expand(2, -1))
    torch.testing.assert_close(y[:, positions >= 0], alone)


WRONG = [
    ({"q": 3}, r"q is 3: give a tensor B L K H"),
    ({"k": torch.zeros(2, 5, 3, 6)}, r"do not fit together: give q and k B L K H"),
    ({"v": torch.zeros(2, 5, 3, 5)}, r"with N a multiple of K"),
    ({"v": torch.zeros(2, 5, 4)}, r"v has the shape \(2, 5, 4\): give B L N V"),
    ({"decay": torch.zeros(2, 5, 2)}, r"decay is \(2, 5, 2\): give \(2, 5, 4\), \(2, 5, 4, 6\), or None"),
    ({"decay": -1.0}, r"decay is -1.0: give a tensor B L N"),
    ({"beta": torch.zeros(2, 4, 4)}, r"beta is \(2, 4, 4\): give \(2, 5, 4\), or None"),
    ({"beta": torch.zeros(2, 5, 4, dtype=torch.int64)}, r"beta is a tensor of torch.int64: give floating-point"),
    ({"positions": torch.zeros(2, 5)}, r"positions is a tensor of torch.float32: give whole numbers"),
    ({"positions": torch.zeros(1, 5, dtype=torch.int64)}, r"do not fit together"),
    ({"start": torch.zeros(2, 4, 5, 6)}, r"start is \(2, 4, 5, 6\): give the state of an earlier call"),
    ({"start": 0}, r"start is 0: give the state of an earlier call, a tensor \(2, 4, 6, 5\), or None"),
    ({"mode": "chunk"}, r"unknown mode 'chunk'.*did you mean 'chunked'"),
    ({"chunk": 8192}, r"chunk is 8192: give a number of tokens from 1 to 4096"),
    ({"chunk": 0}, r"chunk is 0: give a number of tokens"),
    ({"chunk": True}, r"chunk is True: give a number of tokens"),
    ({"normalised": True}, r"normalised and beta were given: .*give one"),
    ({"mode": "fla"}, r"the kernels of fla run on a GPU and the tensors are on cpu: choose another impl"),
]


@pytest.mark.parametrize(("given", "words"), WRONG, ids=lambda x: x if isinstance(x, str) else "")
def test_what_does_not_fit_is_refused_by_name(given, words):
    names = ("q", "k", "v", "decay", "beta", "positions")
    parts = dict(zip(names, drawn((2, 4, 6, 5), 5, "head", True), strict=True))
    with pytest.raises(UserError, match=words):
        recur(**{**parts, **given})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"x": None}, "x is None: give a tensor B L D"),
        ({"taps": torch.zeros(2, 4)}, "do not fit together: give x B L D, taps T D"),
        ({"past": torch.zeros(2, 2, 3)}, r"past is \(2, 2, 3\): give what an earlier call returned"),
    ],
)
def test_a_convolution_that_does_not_fit_is_refused(given, words):
    parts = {"x": torch.zeros(2, 5, 3), "taps": torch.zeros(2, 3), "positions": torch.zeros(2, 5, dtype=torch.int64)}
    with pytest.raises(UserError, match=words):
        short_conv(**{**parts, **given})


KERNELS = {
    "gated_delta_rule": ("chunk_gated_delta_rule", "head", True),
    "kda": ("chunk_kda", "channel", True),
    "simple_gla": ("chunk_simple_gla", "head", False),
}


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_of_fla_are_called_with_the_arguments_that_they_document(name, monkeypatch):
    """A stand-in with the signature and the shapes of fla's documentation; the real one needs a GPU."""
    function, rate, delta = KERNELS[name]
    seen = {}

    def kernel(q, k, v, g, beta=None, scale=None, initial_state=None, output_final_state=False):
        assert scale == 1.0 and output_final_state and g.dtype == initial_state.dtype == torch.float32
        assert (delta or q.shape[2] == v.shape[2]) and q.is_contiguous()
        seen["dtype"] = q.dtype
        where = torch.arange(q.shape[1]).expand(q.shape[:2])
        y, state = recur(q, k, v, g, beta, positions=where, start=initial_state, mode="recurrent")
        return y, state

    for path in ("fla", "fla.ops", f"fla.ops.{name}"):
        module = ModuleType(path)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, path, module)
    setattr(sys.modules[f"fla.ops.{name}"], function, kernel)
    monkeypatch.setattr(recurrence, "check_fla", lambda device: None)
    *parts, positions = drawn((2, 4, 6, 5), 9, rate, delta)
    parts = [None if t is None else t.float() for t in parts]
    start = torch.randn(2, 4, 6, 5)
    want, last = recur(*parts, positions=positions, start=start)
    y, state = recur(*parts, positions=positions, start=start, mode="fla")
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-4, atol=1e-5)
    recur(*(t if t is None else t.bfloat16() for t in parts), positions=positions, mode="fla")
    assert seen["dtype"] == torch.bfloat16


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(recurrence.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"need the package flash-linear-attention: pip install 'attnlab\[fla\]'"):
        recurrence.check_fla(torch.device("cuda"))


def test_a_run_whose_kernels_are_not_here_is_refused_before_anything_is_written(tmp_path):
    config = presets.get("quick")
    model = replace(config.model, mechanisms=("kda",), options={"kda": {"impl": "fla"}})
    config = replace(config, model=model, train=replace(config.train, device="cpu"))
    with pytest.raises(UserError, match="the kernels of fla run on a GPU"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
