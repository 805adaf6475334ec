"""Independent witnesses: each mechanism against its formula, written here a second time, one token at a time, in
float64, with plain loops; and against PyTorch's own attention. Nothing of ops, kernels or cache is used."""

import math
import re
from pathlib import Path

import pytest
import torch
from torch.nn.functional import gelu

from attnlab import attention

B, L, D, N, H = 2, 23, 64, 4, 16


def softmax(scores):
    top = max(scores)
    weights = [math.exp(s - top) for s in scores]
    return [w / sum(weights) for w in weights]


def turn(x, position, theta=10_000.0, places=()):
    """Rotary embedding as complex numbers: pair (i, i + H/2) is one number, multiplied by e^(i angle)."""
    half = len(x) // 2
    z = torch.complex(x[:half], x[half:])
    place = torch.tensor(places or [i / half for i in range(half)], dtype=torch.float64)
    angle = position * theta**-place
    z = z * torch.polar(torch.ones(half, dtype=torch.float64), angle)
    return torch.cat([z.real, z.imag])


def weighted(q, keys, values, scale):
    weights = softmax([float(q @ k) * scale for k in keys])
    return sum(w * v for w, v in zip(weights, values, strict=True))


def heads(weight, x):
    return (weight @ x).view(-1, H)


def grouped(m, x, window=None):
    c = m.config
    q_w, k_w, v_w = m.qkv.weight.split([N * H, c.n_kv_heads * H, c.n_kv_heads * H])
    out = []
    for t in range(L):
        start = 0 if window is None else max(0, t - window + 1)
        q = [turn(h, t) for h in heads(q_w, x[t])]
        seen = range(start, t + 1)
        y = []
        for n in range(N):
            j = n // (N // c.n_kv_heads)
            keys, values = [turn(heads(k_w, x[s])[j], s) for s in seen], [heads(v_w, x[s])[j] for s in seen]
            y.append(weighted(q[n], keys, values, H**-0.5))
        out.append(m.o.weight @ torch.cat(y))
    return torch.stack(out)


def latent(m, x, chosen=None):
    """mla; `chosen(t)`: the tokens that t may attend to."""
    c = m.config
    compressed = [m.down.weight @ x[s] for s in range(L)]
    norm = [z[: c.kv_rank] / (z[: c.kv_rank].pow(2).mean() + 1e-6).sqrt() * m.norm.weight for z in compressed]
    shared = [turn(z[c.kv_rank :], s, places=c.rope_places) for s, z in enumerate(compressed)]
    out = []
    for t in range(L):
        seen = list(range(t + 1)) if chosen is None else chosen(t)
        q = (m.q.weight @ x[t]).view(N, -1)
        y = []
        for n in range(N):
            k_up, v_up = m.k_up.weight.view(N, H, -1)[n], m.v_up.weight.view(N, c.v_dim, -1)[n]
            query = torch.cat([q[n, :H], turn(q[n, H:], t, places=c.rope_places)])
            keys = [torch.cat([k_up @ norm[s], shared[s]]) for s in seen]
            y.append(weighted(query, keys, [v_up @ norm[s] for s in seen], (H + c.rope_dim) ** -0.5))
        out.append(m.o.weight @ torch.cat(y))
    return torch.stack(out)


def sparse_latent(m, x):
    c = m.config
    key = [turn(m.index_k.weight @ x[s], s) for s in range(L)]

    def chosen(t):
        q = [turn(h, t) for h in (m.index_q.weight @ x[t]).view(c.index_heads, -1)]
        w = m.index_w.weight @ x[t]
        score = {
            s: sum(float(w[j]) * max(0.0, float(q[j] @ key[s])) for j in range(c.index_heads)) for s in range(t + 1)
        }
        best = sorted(score, key=lambda s: (t - s >= c.local, -score[s], -s))
        return sorted(best[: c.top_k])

    return latent(m, x, chosen)


def memory_keyed(m, x):
    c = m.config
    q_w, k_w, v_w = m.qkv.weight.split([N * H] * 3)
    mean = [x[j * c.chunk : (j + 1) * c.chunk].mean(0) for j in range(L // c.chunk)]
    mean_k = [[turn(h, j * c.chunk + c.chunk - 1) for h in heads(k_w, mu)] for j, mu in enumerate(mean)]
    mean_v = [heads(v_w, mu) for mu in mean]
    k = [[turn(h, s) for h in heads(k_w, x[s])] for s in range(L)]
    v = [heads(v_w, x[s]) for s in range(L)]
    out = []
    for t in range(L):
        raw = q_w @ x[t]
        hidden = gelu(m.gate[0].weight @ raw + m.gate[0].bias)
        logits = (m.gate[2].weight @ hidden + m.gate[2].bias).tolist()
        q = [turn(h, t) for h in raw.view(N, H)]
        past = range(t // c.chunk)
        match = {j: sum(float(q[n] @ mean_k[j][n]) for n in range(N)) for j in past}
        recalled = sorted(match, key=lambda j: -match[j])[: c.recall]
        tokens = [s for j in recalled for s in range(j * c.chunk, (j + 1) * c.chunk)]
        gate = softmax(logits) if past else [1.0, 0.0, 0.0]
        y = []
        for n in range(N):
            start = 0 if c.window is None else max(0, t - c.window + 1)
            near = range(start, t + 1)
            part = gate[0] * weighted(q[n], [k[s][n] for s in near], [v[s][n] for s in near], H**-0.5)
            if past:
                part += gate[1] * weighted(q[n], [mean_k[j][n] for j in past], [mean_v[j][n] for j in past], H**-0.5)
                part += gate[2] * weighted(q[n], [k[s][n] for s in tokens], [v[s][n] for s in tokens], H**-0.5)
            y.append(part)
        out.append(m.o.weight @ torch.cat(y))
    return torch.stack(out)


def fast_memory_keyed(m, x):
    decay = 0.05 + 0.95 * m.decay.sigmoid()
    memory, k, v, out = torch.zeros(D, dtype=torch.float64), [], [], []
    for t in range(L):
        memory = decay * memory + (1 - decay) * x[t]
        raw = m.q.weight @ x[t]
        hidden = gelu(m.gate[0].weight @ raw + m.gate[0].bias)
        gate = softmax((m.gate[2].weight @ hidden + m.gate[2].bias).tolist())
        key, value = (m.kv.weight @ (gate[0] * x[t] + gate[1] * memory)).split(N * H)
        k.append([turn(h, t) for h in key.view(N, H)])
        v.append(value.view(N, H))
        q = [turn(h, t) for h in raw.view(N, H)]
        y = [
            weighted(q[n], [k[s][n] for s in range(t + 1)], [v[s][n] for s in range(t + 1)], H**-0.5) for n in range(N)
        ]
        out.append(m.o.weight @ torch.cat(y))
    return torch.stack(out)


def mlp_latent(m, x):
    z = [m.latent[2].weight @ gelu(m.latent[0].weight @ row) for row in x]
    total = x + grouped(m, torch.stack(z))
    centred = total - total.mean(1, keepdim=True)
    return centred / (centred.pow(2).mean(1, keepdim=True) + 1e-5).sqrt() * m.norm.weight + m.norm.bias


def lookup(m, x):
    out = []
    for row in x:
        y = []
        for n, (q, value) in enumerate(zip(heads(m.q.weight, row), heads(m.v.weight, row), strict=True)):
            score = [float(q @ e) * H**-0.5 for e in m.latents[n]]
            best = sorted(range(len(score)), key=lambda i: -score[i])[: m.config.top_k]
            weights = softmax([score[i] for i in best])
            y.append(sum(w * m.latents[n, i] for w, i in zip(weights, best, strict=True)) + value)
        out.append(m.o.weight @ torch.cat(y))
    return torch.stack(out)


CASES = [
    ("mha", {}, grouped),
    ("gqa", {"n_kv_heads": 2}, grouped),
    ("mqa", {}, grouped),
    ("sliding", {"window": 7}, lambda m, x: grouped(m, x, 7)),
    ("mla", {"mode": "expanded", "v_dim": 10}, latent),
    ("mla", {"mode": "absorbed", "kv_rank": 20, "rope_dim": 4}, latent),
    ("mla", {"rope_places": (0.5, 0.5, 0.125)}, latent),
    ("msla", {"top_k": 6, "local": 2}, sparse_latent),
    ("mka", {"chunk": 5, "recall": 2}, memory_keyed),
    ("mka", {"chunk": 3, "recall": 1, "window": 4}, memory_keyed),
    ("fast_mka", {}, fast_memory_keyed),
    ("mlp_latent", {}, mlp_latent),
    ("latent_lookup", {"n_latents": 30, "top_k": 4}, lookup),
]


@pytest.mark.parametrize(("name", "options", "formula"), CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_mechanism_is_its_formula(name, options, formula):
    torch.manual_seed(1)
    m = attention.build(name, d_model=D, n_heads=N, head_dim=H, **options).double().eval()
    with torch.no_grad():
        for p in m.parameters():  # away from special values such as a gate that is nearly shut
            p.add_(0.1 * torch.randn_like(p))
        x = torch.randn(B, L, D).double()
        got, _ = m(x, torch.arange(L).expand(B, L))
        want = torch.stack([formula(m, row) for row in x])
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_every_mechanism_of_the_package_has_a_witness():
    files = Path(__file__).parent.glob("test_formulas*.py")
    named = {name for file in files for name in re.findall(r'^    \(?"(\w+)"[,:]', file.read_text(), re.MULTILINE)}
    assert named >= attention._own()


def test_mha_is_torch_multi_head_attention():
    torch.manual_seed(0)
    ours = attention.build("mha", rope_theta=None, bias=True).double()
    theirs = torch.nn.MultiheadAttention(D, N, batch_first=True).double()
    theirs.load_state_dict(
        {
            "in_proj_weight": ours.qkv.weight,
            "in_proj_bias": ours.qkv.bias,
            "out_proj.weight": ours.o.weight,
            "out_proj.bias": ours.o.bias,
        }
    )
    x = torch.randn(B, L, D).double()
    future = torch.ones(L, L, dtype=torch.bool).triu(1)
    want, _ = theirs(x, x, x, attn_mask=future, need_weights=False)
    torch.testing.assert_close(ours(x, torch.arange(L).expand(B, L))[0], want)


def test_sparse_latent_attention_with_room_for_all_is_latent_attention():
    torch.manual_seed(0)
    sparse = attention.build("msla", top_k=L).double().eval()
    dense = attention.build("mla").double().eval()
    dense.load_state_dict(sparse.state_dict(), strict=False)
    x, positions = torch.randn(B, L, D).double(), torch.arange(L).expand(B, L)
    assert torch.equal(sparse(x, positions)[0], dense(x, positions)[0])


def test_indexer_learns_where_attention_looks():
    torch.manual_seed(0)
    m = attention.build("msla", top_k=8, local=1, warmup=1000)
    x, positions = torch.randn(8, L, D), torch.arange(L).expand(8, L)
    indexer = [p for name, p in m.named_parameters() if name.startswith("index")]
    optimizer = torch.optim.Adam(indexer, 1e-2)
    from attnlab.recording import record_losses

    losses = []
    for _ in range(60):
        with record_losses() as seen:
            y, _ = m(x, positions)
        optimizer.zero_grad()
        (0 * y.sum()).backward()
        optimizer.step()
        losses.append(seen["indexer"][0].item())
    assert losses[-1] < 0.7 * losses[0]


def test_the_indexer_does_not_move_what_it_reads():
    torch.manual_seed(0)
    m = attention.build("msla", top_k=8)
    x = torch.randn(B, L, D, requires_grad=True)
    y, _ = m(x, torch.arange(L).expand(B, L))
    (0 * y.sum()).backward()  # only the indexer's own loss is left
    moved = {name for name, p in m.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert moved == {"index_q.weight", "index_k.weight", "index_w.weight"}
    assert x.grad.abs().max() == 0
