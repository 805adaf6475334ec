"""Independent witnesses of gates, factors, two maps and blocks: each formula a second time, one token and one head at a
time, in float64 with plain loops; and the code of transformers, where it has the same mechanism."""

from __future__ import annotations

import math

import pytest
import torch

from attnlab import attention
from attnlab.errors import UserError

B, L, D, N, H = 2, 23, 24, 4, 6
SMALL = {"d_model": D, "n_heads": N, "head_dim": H}


def softmax(scores):
    top = max(scores)
    weights = [math.exp(s - top) for s in scores]
    return [w / sum(weights) for w in weights]


def turn(x, position, size=None, theta=10_000.0):
    """Rotary embedding of the first `size` dimensions, pair by pair; None: of all."""
    size = len(x) if size is None else size
    half = size // 2
    y = x.clone()
    for i in range(half):
        angle = position * theta ** (-i / half)
        y[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        y[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return y


def rms(x, weight=1.0, eps=1e-6):
    return x / (x.pow(2).mean() + eps).sqrt() * weight


def read(q, keys, values, size=H):
    """What one query reads, and with which weights."""
    weights = softmax([float(q @ k) / math.sqrt(size) for k in keys])
    return sum(w * v for w, v in zip(weights, values, strict=True)), weights


def heads(layer, x):
    """The output of a layer for one token, head by head."""
    y = layer.weight @ x
    return (y if layer.bias is None else y + layer.bias).view(-1, H)


def grouped(m, x):
    """Queries, keys and values of gqa for every token: N, K and K heads."""
    c = m.config
    found = []
    for t in range(L):
        q, k, v = heads(m.qkv, x[t]).split([N, c.n_kv_heads, c.n_kv_heads])
        if c.qk_norm:
            q, k = (
                torch.stack([rms(h, norm.weight, c.qk_norm) for h in z]) for z, norm in ((q, m.q_norm), (k, m.k_norm))
            )
        q, k = (torch.stack([turn(h, t, c.rope_dim) for h in z]) for z in (q, k))
        found.append((q, k, v))
    return zip(*found, strict=True)


def out(m, y):
    return m.o.weight @ torch.cat(y) + (0 if m.o.bias is None else m.o.bias)


def gated(m, x):
    q, k, v = grouped(m, x)
    group = N // m.config.n_kv_heads
    rows = []
    for t in range(L):
        gate = m.opening.weight @ x[t] + (0 if m.opening.bias is None else m.opening.bias)
        gate = (1 / (1 + (-gate).exp())).view(N, -1)
        past = range(t + 1)
        y = [
            gate[n] * read(q[t][n], [k[s][n // group] for s in past], [v[s][n // group] for s in past])[0]
            for n in range(N)
        ]
        rows.append(out(m, y))
    return torch.stack(rows)


def tensor_product(m, x):
    R, Q = m.config.rank, m.config.q_rank
    q, k, v = [], [], []
    for t in range(L):
        a = (m.a.weight @ x[t]).view(-1, N)
        b = (m.b.weight @ x[t]).view(-1, H)
        q.append([sum(a[r, n] * turn(b[r], t) for r in range(Q)) / Q for n in range(N)])
        k.append([sum(a[Q + r, n] * turn(b[Q + r], t) for r in range(R)) / R for n in range(N)])
        v.append([sum(a[Q + R + r, n] * b[Q + R + r] for r in range(R)) / R for n in range(N)])
    rows = []
    for t in range(L):
        past = range(t + 1)
        rows.append(out(m, [read(q[t][n], [k[s][n] for s in past], [v[s][n] for s in past])[0] for n in range(N)]))
    return torch.stack(rows)


def factorized(m, x):
    keys, values, rows = [], [], []
    for t in range(L):
        key = m.k.weight @ x[t]
        keys.append(turn(key, t))
        values.append(key + m.alpha * (m.v.weight @ key) if m.config.key_reuse else m.v.weight @ x[t])
        q = (m.q_up.weight @ rms(m.q_down.weight @ x[t], m.q_norm.weight)).view(N, H)
        rows.append(out(m, [read(turn(q[n], t), keys, values)[0] for n in range(N)]))
    return torch.stack(rows)


def differential(m, x):
    c = m.config
    q, k, v = grouped(m, x)
    pairs = c.n_kv_heads // 2
    lq1, lk1, lq2, lk2 = m.lambdas
    weight = math.exp(float(lq1 @ lk1)) - math.exp(float(lq2 @ lk2)) + m.l0
    rows = []
    for t in range(L):
        y = []
        for n in range(N // 2):
            j = n // (N // c.n_kv_heads)
            values = [torch.cat([v[s][2 * j], v[s][2 * j + 1]]) for s in range(t + 1)]
            first, _ = read(q[t][n], [k[s][j] for s in range(t + 1)], values)
            second, _ = read(q[t][N // 2 + n], [k[s][pairs + j] for s in range(t + 1)], values)
            y.append((1 - m.l0) * rms(first - weight * second, m.norm.weight, 1e-5))
        rows.append(out(m, y))
    return torch.stack(rows)


def blocks_of_keys(m, x):
    c = m.config
    q, k, v = grouped(m, x)
    group = N // c.n_kv_heads
    rows = []
    for t in range(L):
        own, y = t // c.block, []
        for n in range(N):
            j = n // group
            mean = [sum(k[s][j] for s in range(i * c.block, (i + 1) * c.block)) / c.block for i in range(own)]
            score = {i: float(q[t][n] @ mean[i]) for i in range(own)}
            chosen = {own, *sorted(score, key=lambda i: -score[i])[: c.top_k - 1]}
            past = [s for s in range(t + 1) if s // c.block in chosen]
            y.append(read(q[t][n], [k[s][j] for s in past], [v[s][j] for s in past])[0])
        rows.append(out(m, y))
    return torch.stack(rows)


def native_sparse(m, x):
    c = m.config
    q, k, v = grouped(m, x)
    K, l = c.n_kv_heads, c.block
    branches = []
    for t in range(L):
        k1, v1, k3, v3 = (m.further.weight @ x[t]).view(4, K, H)
        branches.append((k1, v1, torch.stack([turn(h, t) for h in k3]), v3))
    w_k, w_v = m.within.view(l, 2, K, H).unbind(1)
    small_k, small_v = [], []
    for i in range(L // l):
        summed = sum(w_k[s % l] * branches[s][0] for s in range(i * l, (i + 1) * l))
        small_k.append(torch.stack([turn(h, (i + 1) * l - 1) for h in summed]))
        small_v.append(sum(w_v[s % l] * branches[s][1] for s in range(i * l, (i + 1) * l)))
    rows = []
    for t in range(L):
        gate = (1 / (1 + (-(m.opening.weight @ x[t])).exp())).view(3, N)
        own = t // l
        complete = range((t + 1) // l)
        near = range(max(0, t - c.window + 1), t + 1)
        y = []
        for n in range(N):
            j = n // (N // K)
            answer = torch.zeros(H, dtype=torch.float64)
            score = dict.fromkeys(range(own), 0.0)
            for other in range(j * N // K, (j + 1) * N // K):
                if not complete:
                    continue
                first, weights = read(q[t][other], [small_k[i][j] for i in complete], [small_v[i][j] for i in complete])
                answer = gate[0, n] * first if other == n else answer
                for i in range(own):
                    score[i] += weights[i]
            order = [own, own - 1, 0, *sorted(score, key=lambda i: -score[i])]
            chosen = list(dict.fromkeys(i for i in order if i >= 0))[: c.top_k]
            past = [s for s in range(t + 1) if s // l in chosen]
            answer = answer + gate[1, n] * read(q[t][n], [k[s][j] for s in past], [v[s][j] for s in past])[0]
            third = read(q[t][n], [branches[s][2][j] for s in near], [branches[s][3][j] for s in near])[0]
            y.append(answer + gate[2, n] * third)
        rows.append(out(m, y))
    return torch.stack(rows)


CASES = [
    ("gated", {}, gated),
    ("gated", {"elementwise": True, "qk_norm": 1e-6, "n_kv_heads": 2, "rope_dim": 2, "bias": True}, gated),
    ("tpa", {}, tensor_product),
    ("tpa", {"rank": 1, "q_rank": 3}, tensor_product),
    ("mfa", {}, factorized),
    ("mfa", {"key_reuse": True, "q_rank": 5}, factorized),
    ("differential", {"lambda_init": 0.3}, differential),
    ("differential", {"n_kv_heads": 2, "qk_norm": 1e-6, "bias": True}, differential),
    ("moba", {"block": 3, "top_k": 3}, blocks_of_keys),
    ("moba", {"block": 4, "top_k": 1, "n_kv_heads": 2}, blocks_of_keys),
    ("nsa", {"block": 3, "top_k": 4, "window": 5, "n_kv_heads": 2}, native_sparse),
    ("nsa", {"block": 4, "top_k": 2, "window": 1, "n_kv_heads": 1}, native_sparse),
]


@pytest.mark.parametrize(("name", "fields", "formula"), CASES, ids=lambda v: str(v) if not callable(v) else "")
def test_a_mechanism_is_its_formula(name, fields, formula):
    torch.manual_seed(1)
    m = attention.build(name, **SMALL, **fields).double().eval()
    x = torch.randn(B, L, D, dtype=torch.float64)
    with torch.no_grad():
        for p in m.parameters():  # away from special values, and large enough that choices are clear
            p.add_(0.3 * torch.randn_like(p))
        y, _ = m(x, torch.arange(L).expand(B, -1))
        want = torch.stack([formula(m, row) for row in x])
    torch.testing.assert_close(y, want, rtol=1e-10, atol=1e-11)


def rotation(size, theta=10_000.0):
    angle = torch.arange(L)[:, None] * theta ** (-torch.arange(size // 2) * 2 / size)
    angle = torch.cat([angle, angle], -1)[None]
    return angle.cos().double(), angle.sin().double()


def future():
    return torch.full((L, L), -torch.inf, dtype=torch.float64).triu(1)[None, None]


def test_gated_attention_is_that_of_qwen3_next():
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextAttention, Qwen3NextConfig

    torch.manual_seed(0)
    config = Qwen3NextConfig(
        hidden_size=D, num_attention_heads=N, num_key_value_heads=2, head_dim=8, num_hidden_layers=1
    )
    config._attn_implementation = "eager"
    theirs = Qwen3NextAttention(config, 0).double().eval()
    with torch.no_grad():
        theirs.q_norm.weight.uniform_(-0.5, 0.5)
        theirs.k_norm.weight.uniform_(-0.5, 0.5)
    fields = {"n_kv_heads": 2, "elementwise": True, "qk_norm": config.rms_norm_eps, "rope_dim": 2}
    ours = attention.build("gated", d_model=D, n_heads=N, head_dim=8, **fields).double().eval()
    q, gate = theirs.q_proj.weight.unflatten(0, (N, 2, 8)).unbind(1)
    ours.load_state_dict(
        {
            "qkv.weight": torch.cat([q.flatten(0, 1), theirs.k_proj.weight, theirs.v_proj.weight]),
            "q_norm.weight": 1 + theirs.q_norm.weight,
            "k_norm.weight": 1 + theirs.k_norm.weight,
            "opening.weight": gate.flatten(0, 1),
            "o.weight": theirs.o_proj.weight,
        }
    )
    x = torch.randn(B, L, D, dtype=torch.float64)
    with torch.no_grad():
        want, _ = theirs(x, rotation(2), future())
        torch.testing.assert_close(ours(x, torch.arange(L).expand(B, -1))[0], want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_differential_attention_is_that_of_diff_llama(kv_heads):
    from transformers.models.diffllama.modeling_diffllama import DiffLlamaAttention, DiffLlamaConfig

    torch.manual_seed(0)
    layer = 2
    config = DiffLlamaConfig(
        hidden_size=D, num_attention_heads=N, num_key_value_heads=kv_heads, head_dim=H, num_hidden_layers=3
    )
    config._attn_implementation = "eager"
    config.lambda_std_dev = 1.0
    theirs = DiffLlamaAttention(config, layer).double().eval()
    start = 0.8 - 0.6 * math.exp(-0.3 * layer)
    ours = attention.build("differential", **SMALL, n_kv_heads=kv_heads, lambda_init=start).double().eval()
    halves = theirs.v_proj.weight.unflatten(0, (2, -1, H))  # theirs: the first half of each value, then the second
    lambdas = [theirs.lambda_q1, theirs.lambda_k1, theirs.lambda_q2, theirs.lambda_k2]
    ours.load_state_dict(
        {
            "qkv.weight": torch.cat([theirs.q_proj.weight, theirs.k_proj.weight, halves.transpose(0, 1).flatten(0, 2)]),
            "lambdas": torch.stack(lambdas),
            "norm.weight": torch.ones(2 * H),
            "o.weight": theirs.o_proj.weight,
        }
    )
    ours.norm.eps = config.rms_norm_eps
    x = torch.randn(B, L, D, dtype=torch.float64)
    with torch.no_grad():
        want, _ = theirs(x, rotation(H), future())
        torch.testing.assert_close(ours(x, torch.arange(L).expand(B, -1))[0], want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("name", "room"), [("moba", {"block": 5, "top_k": 5}), ("moba", {"block": L, "top_k": 1})])
def test_with_room_for_every_block_it_is_dense_attention(name, room):
    torch.manual_seed(0)
    sparse = attention.build(name, **SMALL, **room).double().eval()
    dense = attention.build("mha", **SMALL).double().eval()
    dense.load_state_dict(sparse.state_dict())
    x, positions = torch.randn(B, L, D).double(), torch.arange(L).expand(B, L)
    torch.testing.assert_close(sparse(x, positions)[0], dense(x, positions)[0], rtol=1e-12, atol=1e-12)


BAD = [
    ("gated", {"rope_dim": 3}, "rope_dim is 3: give an even number up to head_dim, 6"),
    ("gqa", {"rope_dim": 8}, "rope_dim is 8: give an even number up to head_dim, 6"),
    ("gated", {"n_kv_heads": 3}, "n_kv_heads 3 does not divide n_heads 4: give one of 1, 2, 4"),
    ("tpa", {"rank": 0}, "rank is 0: it must be at least 1"),
    ("tpa", {"q_rank": 0}, "q_rank is 0: it must be at least 1"),
    ("mfa", {"q_rank": 0}, "q_rank is 0: it must be at least 1"),
    (
        "differential",
        {"n_kv_heads": 1},
        "n_heads is 4 and n_kv_heads 1: differential heads come in pairs, so give even",
    ),
    ("differential", {"n_heads": 3}, "n_heads is 3 and n_kv_heads 3: differential heads come in pairs, so give even"),
    ("differential", {"lambda_init": 1.0}, "lambda_init is 1.0: it must be"),
    ("moba", {"block": 0}, "block is 0: it must be at least 1"),
    ("moba", {"top_k": 0}, "top_k is 0: it must be at least 1"),
    ("moba", {"impl": "flex"}, "unknown impl 'flex'"),
    ("nsa", {"window": 0}, "window is 0: it must be at least 1"),
    ("nsa", {"block": -1}, "block is -1: it must be at least 1"),
]


@pytest.mark.parametrize(("name", "fields", "words"), BAD, ids=str)
def test_an_option_that_makes_no_sense_is_refused(name, fields, words):
    with pytest.raises(UserError, match=words):
        attention.config(name, **{**SMALL, **fields})
