"""Independent witnesses of the recurrent mechanisms: each formula a second time, one token and one head at a time, in
float64; and the code of transformers, where it has the same mechanism."""

from __future__ import annotations

import math

import pytest
import torch

from attnlab import attention
from attnlab.errors import UserError
from attnlab.laws.prepare import shaken

B, L, D, N, H = 2, 11, 24, 4, 6
SMALL = {"d_model": D, "n_heads": N, "head_dim": H, "rope_theta": None}


def silu(x):
    return x / (1 + (-x).exp())


def softplus(x):
    return torch.log1p(x.exp())


def rms(x, weight, eps):
    return x / (x.pow(2).mean() + eps).sqrt() * weight


def unit(x):
    return x / (x.pow(2).sum() + 1e-6).sqrt()


def convolved(rows, taps, t):
    """silu of the convolution at token t; before the first token is nothing."""
    total = sum(taps[len(taps) - 1 - i] * rows[t - i] for i in range(len(taps)) if t >= i)
    return silu(total)


def linear(m, x):
    def feature(z):
        return torch.where(z > 0, z + 1, z.exp())

    q, k, v = (m.qkv.weight @ x.T).T.view(L, 3, N, H).unbind(1)
    out = []
    for t in range(L):
        y = []
        for n in range(N):
            weights = [float(feature(q[t, n]) @ feature(k[s, n])) for s in range(t + 1)]
            y.append(sum(w * v[s, n] for s, w in enumerate(weights)) / sum(weights))
        out.append(m.o.weight @ torch.cat(y))
    return torch.stack(out)


def gated_delta(m, x):
    c = m.config
    inputs = [m.qkv.weight @ x[t] for t in range(L)]
    state = torch.zeros(N, H, c.v_dim, dtype=torch.float64)
    out = []
    for t in range(L):
        q, k, v = convolved(inputs, m.taps, t).split(c.sizes)
        ab, gate = m.ab.weight @ x[t], m.g.weight @ x[t]
        y = []
        for n in range(N):
            j = n // (N // c.key_heads)
            query, key = (unit(z.view(c.key_heads, H)[j]) for z in (q, k))
            a = (-m.A_log[n].exp() * softplus(ab[n] + m.dt_bias[n])).exp()
            b = 1 / (1 + (-ab[N + n]).exp())
            erased = torch.eye(H, dtype=torch.float64) - b * torch.outer(key, key)
            state[n] = a * erased @ state[n] + b * torch.outer(key, v.view(N, -1)[n])
            read = state[n].T @ query / math.sqrt(H)
            y.append(rms(read, m.norm.weight, 1e-6) * silu(gate.view(N, -1)[n]))
        out.append(m.o.weight @ torch.cat(y))
    return torch.stack(out)


def kda(m, x):
    inputs = [m.qkv.weight @ x[t] for t in range(L)]
    state = torch.zeros(N, H, H, dtype=torch.float64)
    out = []
    for t in range(L):
        q, k, v = convolved(inputs, m.taps, t).view(3, N, H)
        rate = softplus(m.f[1].weight @ (m.f[0].weight @ x[t]) + m.dt_bias).view(N, H)
        gate = 1 / (1 + (-(m.g[1].weight @ (m.g[0].weight @ x[t])).view(N, H)).exp())
        y = []
        for n in range(N):
            key = unit(k[n])
            a = (-m.A_log[n].exp() * rate[n]).exp()
            b = 1 / (1 + (-(m.b.weight @ x[t])[n]).exp())
            erased = torch.eye(H, dtype=torch.float64) - b * torch.outer(key, key)
            state[n] = erased @ torch.diag(a) @ state[n] + b * torch.outer(key, v[n])
            y.append(rms(state[n].T @ unit(q[n]) / math.sqrt(H), m.norm.weight, 1e-6) * gate[n])
        out.append(m.o.weight @ torch.cat(y))
    return torch.stack(out)


def mamba2(m, x):
    """The quadratic form of the paper: no state, but sums over all earlier tokens."""
    c = m.config
    parts = [(m.into.weight @ x[t]).split(m.sizes) for t in range(L)]
    inputs = [mixed for _, mixed, _ in parts]
    step = [softplus(d + m.dt_bias) for _, _, d in parts]
    rows = []
    for t in range(L):
        total = m.taps_bias + sum(m.taps[c.conv - 1 - i] * inputs[t - i] for i in range(c.conv) if t >= i)
        rows.append(silu(total).split([c.inner, c.state, c.state]))
    out = []
    for t in range(L):
        y = []
        for n in range(N):
            own = rows[t][0].view(N, -1)[n] * m.skip[n]
            for s in range(t + 1):
                fall = torch.exp(-m.A_log[n].exp() * sum((step[i][n] for i in range(s + 1, t + 1)), torch.zeros(())))
                own = own + (rows[t][2] @ rows[s][1]) * fall * step[s][n] * rows[s][0].view(N, -1)[n]
            y.append(own)
        out.append(m.o.weight @ rms(torch.cat(y) * silu(parts[t][0]), m.norm.weight, 1e-5))
    return torch.stack(out)


FORMULAS = {
    "kda": (kda, [{}, {"rank": 3, "conv": 2, "chunk": 4}]),
    "mamba2": (mamba2, [{}, {"state": 5, "v_dim": 3, "conv": 2, "chunk": 4}]),
    "linear": (linear, [{}, {"chunk": 4}]),
    "gated_delta": (gated_delta, [{}, {"key_heads": 2, "v_dim": 5, "conv": 3, "chunk": 4}]),
}


@pytest.mark.parametrize(("name", "fields"), [(n, f) for n, (_, all_) in FORMULAS.items() for f in all_], ids=str)
def test_a_mechanism_is_its_formula(name, fields):
    torch.manual_seed(3)
    module = shaken(attention.build(name, **SMALL, **fields)).double().eval()
    x = torch.randn(B, L, D, dtype=torch.float64)
    with torch.no_grad():
        y, _ = module(x, torch.arange(L).expand(B, -1))
        for b in range(B):
            torch.testing.assert_close(y[b], FORMULAS[name][0](module, x[b]), rtol=1e-9, atol=1e-9)


def positions():
    return torch.arange(L).expand(B, -1)


def test_gated_delta_is_that_of_qwen3_next():
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextConfig, Qwen3NextGatedDeltaNet

    torch.manual_seed(0)
    K, V = 2, 5
    config = Qwen3NextConfig(
        hidden_size=D,
        linear_num_value_heads=N,
        linear_num_key_heads=K,
        linear_key_head_dim=H,
        linear_value_head_dim=V,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
    )
    theirs = shaken(Qwen3NextGatedDeltaNet(config, 0)).eval()
    ours = attention.build("gated_delta", **SMALL, key_heads=K, v_dim=V).eval()
    G = N // K
    qkvz = theirs.in_proj_qkvz.weight.unflatten(0, (K, -1))  # by key head: q, k, its values, their gates
    q, k, v, z = (t.flatten(0, 1) for t in qkvz.split([H, H, G * V, G * V], 1))
    b, a = (t.flatten(0, 1) for t in theirs.in_proj_ba.weight.unflatten(0, (K, -1)).chunk(2, 1))
    state = {
        "qkv.weight": torch.cat([q, k, v]),
        "taps": theirs.conv1d.weight[:, 0].T,
        "ab.weight": torch.cat([a, b]),
        "A_log": theirs.A_log,
        "dt_bias": theirs.dt_bias,
        "g.weight": z,
        "norm.weight": theirs.norm.weight,
        "o.weight": theirs.out_proj.weight,
    }
    ours.load_state_dict(state)
    x = torch.randn(B, L, D)
    with torch.no_grad():
        torch.testing.assert_close(ours(x, positions())[0], theirs(x), rtol=1e-4, atol=1e-5)


def test_kda_is_that_of_kimi_linear():
    from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearConfig, KimiLinearDeltaAttention

    torch.manual_seed(0)
    config = KimiLinearConfig(hidden_size=D, linear_head_dim=H, linear_num_heads=N, num_hidden_layers=1)
    theirs = KimiLinearDeltaAttention(config, 0)
    with torch.no_grad():
        theirs.forget_gate.dt_bias.normal_()
        theirs.forget_gate.A_log.normal_()
    theirs = shaken(theirs).eval()
    ours = attention.build("kda", **SMALL).eval()
    state = {
        "qkv.weight": torch.cat([theirs.q_proj.weight, theirs.k_proj.weight, theirs.v_proj.weight]),
        "taps": theirs.conv1d.weight[:, 0].T,
        "f.0.weight": theirs.forget_gate.f_a_proj.weight,
        "f.1.weight": theirs.forget_gate.f_b_proj.weight,
        "A_log": theirs.forget_gate.A_log.flatten(),
        "dt_bias": theirs.forget_gate.dt_bias,
        "b.weight": theirs.b_proj.weight,
        "g.0.weight": theirs.g_a_proj.weight,
        "g.1.weight": theirs.g_b_proj.weight,
        "norm.weight": theirs.o_norm.weight,
        "o.weight": theirs.o_proj.weight,
    }
    ours.load_state_dict(state)
    ours.norm.eps = config.rms_norm_eps
    x = torch.randn(B, L, D)
    with torch.no_grad():
        torch.testing.assert_close(ours(x, positions())[0], theirs(x), rtol=1e-4, atol=1e-5)


def test_mamba2_is_that_of_transformers():
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Config, Mamba2Mixer

    torch.manual_seed(0)
    config = Mamba2Config(
        hidden_size=D, num_heads=N, head_dim=2 * H, expand=2, state_size=5, n_groups=1, num_hidden_layers=1
    )
    theirs = shaken(Mamba2Mixer(config, 0)).eval()
    ours = attention.build("mamba2", **SMALL, state=5).eval()
    state = {
        "into.weight": theirs.in_proj.weight,
        "taps": theirs.conv1d.weight[:, 0].T,
        "taps_bias": theirs.conv1d.bias,
        "A_log": theirs.A_log,
        "dt_bias": theirs.dt_bias,
        "skip": theirs.D,
        "norm.weight": theirs.norm.weight,
        "o.weight": theirs.out_proj.weight,
    }
    ours.load_state_dict(state)
    x = torch.randn(B, L, D)
    with torch.no_grad():
        torch.testing.assert_close(ours(x, positions())[0], theirs(x), rtol=1e-4, atol=1e-5)


BAD = [
    ("mamba2", {"state": 0}, "state is 0: it must be at least 1"),
    ("kda", {"rank": 0}, "rank is 0: it must be at least 1"),
    ("gated_delta", {"chunk": 0}, "chunk is 0: it must be at least 1"),
    ("linear", {"chunk": 8192}, "chunk is 8192: give a number of tokens from 1 to 4096"),
    ("gated_delta", {"key_heads": 3}, "key_heads 3 does not divide n_heads 4: give one of 1, 2, 4"),
    ("gated_delta", {"conv": 0}, "conv is 0: it must be at least 1"),
    ("gated_delta", {"v_dim": 0}, "v_dim is 0: it must be at least 1"),
    ("gated_delta", {"mode": "scan"}, "unknown mode 'scan'"),
    ("linear", {"impl": "flex"}, "unknown impl 'flex'"),
]


@pytest.mark.parametrize(("name", "fields", "words"), BAD, ids=str)
def test_an_option_that_makes_no_sense_is_refused(name, fields, words):
    with pytest.raises(UserError, match=words):
        attention.config(name, **{**SMALL, **fields})


def test_a_kernel_of_fla_is_refused_on_a_cpu():
    module = attention.build("gated_delta", **SMALL, impl="fla")
    with pytest.raises(UserError, match="the kernels of fla run on a GPU and the tensors are on cpu"):
        module(torch.zeros(B, L, D), positions())
