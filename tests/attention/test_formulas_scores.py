"""Independent witnesses of mechanisms whose scores are more than q k: formulas in plain loops, and transformers."""

import math

import pytest
import torch
from test_formulas import B, D, H, L, N, heads, softmax, turn

from attnlab import UserError, attention
from attnlab.attention.alibi import slopes
from attnlab.ops import attend
from attnlab.spec import CAUSAL, Mask


def read(scores, values):
    return sum(w * v for w, v in zip(softmax(scores), values, strict=True))


def tied(m, x):
    c = m.config
    still = H - c.rope_dim
    states = [heads(m.tied.weight, row) for row in x]
    turned = [turn(m.turned.weight @ row, s) for s, row in enumerate(x)]
    out = []
    for t in range(L):
        y = []
        for n, q in enumerate(heads(m.q.weight, x[t])):
            j = n // (N // c.n_kv_heads)
            q = torch.cat([q[:still], turn(q[still:], t)])
            keys = [torch.cat([states[s][j][:still], turned[s]]) for s in range(t + 1)]
            y.append(read([float(q @ k) * H**-0.5 for k in keys], [states[s][j] for s in range(t + 1)]))
        out.append(m.o.weight @ torch.cat(y))
    return torch.stack(out)


def grouped_latent(m, x):
    c = m.config
    rank = c.kv_rank
    latents, turned = [], []
    for s, row in enumerate(x):
        z = m.down.weight @ row
        parts = z[: c.groups * rank].view(c.groups, rank)
        latents.append(
            [p / (p.pow(2).mean() + 1e-6).sqrt() * norm.weight for p, norm in zip(parts, m.norm, strict=True)]
        )
        turned.append(turn(z[c.groups * rank :], s))
    out = []
    for t in range(L):
        y = []
        for n, q in enumerate((m.q.weight @ x[t]).view(N, -1)):
            g = n // (N // c.groups)
            k_up, v_up = m.k_up.weight.view(N, H, -1)[n], m.v_up.weight.view(N, c.v_dim, -1)[n]
            q = torch.cat([q[:H], turn(q[H:], t)])
            keys = [torch.cat([k_up @ latents[s][g], turned[s]]) for s in range(t + 1)]
            scores = [float(q @ k) * (H + c.rope_dim) ** -0.5 for k in keys]
            y.append(read(scores, [v_up @ latents[s][g] for s in range(t + 1)]))
        out.append(m.o.weight @ torch.cat(y))
    return torch.stack(out)


def by_score(score, turned=False, rest=None, window=None):
    """Attention of grouped heads whose scores are `score(m, x, n, t, s, z)`, with the logit `rest(m, n)`."""

    def formula(m, x):
        c = m.config
        sizes = [N * H, c.n_kv_heads * H, c.n_kv_heads * H]
        q, k, v = ([heads(w, row) for row in x] for w in m.qkv.weight.split(sizes))
        if turned:
            q, k = ([[turn(h, s) for h in row] for s, row in enumerate(rows)] for rows in (q, k))
        out = []
        for t in range(L):
            y = []
            seen = range(0 if window is None else max(0, t - window + 1), t + 1)
            for n in range(N):
                j = n // (N // c.n_kv_heads)
                scores = [score(m, x, n, t, s, float(q[t][n] @ k[s][j]) * H**-0.5) for s in seen]
                values = [v[s][j] for s in seen]
                if rest is not None:
                    scores, values = [*scores, rest(m, n)], [*values, torch.zeros(H, dtype=torch.float64)]
                y.append(read(scores, values))
            out.append(m.o.weight @ torch.cat(y))
        return torch.stack(out)

    return formula


def forgotten(m, x, n, t, s, z):
    def gate(u):
        return 1 / (1 + math.exp(-float(m.forget.weight[n] @ x[u] + m.forget.bias[n])))

    return z + sum(math.log(gate(u)) for u in range(s + 1, t + 1))


sink = by_score(lambda m, x, n, t, s, z: z, turned=True, rest=lambda m, n: float(m.sink[n]))
capped = by_score(
    lambda m, x, n, t, s, z: 3 * math.tanh(z / 3), turned=True, rest=lambda m, n: float(m.sink[n]), window=7
)
CASES = [
    ("gta", {"n_kv_heads": 2, "rope_dim": 6}, tied),
    ("gla", {"mode": "expanded", "v_dim": 10}, grouped_latent),
    ("gla", {"mode": "absorbed", "groups": 4, "kv_rank": 9, "rope_dim": 4}, grouped_latent),
    ("alibi", {"n_kv_heads": 2}, by_score(lambda m, x, n, t, s, z: z - 2 ** (-8 * (n + 1) / N) * (t - s))),
    ("fox", {"forget_bias": 1.0}, by_score(forgotten)),
    ("sinks", {"n_kv_heads": 2}, sink),
    ("sinks", {"cap": 3.0, "window": 7}, capped),
]


@pytest.mark.parametrize(("name", "options", "formula"), CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_mechanism_is_its_formula(name, options, formula):
    torch.manual_seed(1)
    m = attention.build(name, d_model=D, n_heads=N, head_dim=H, **options).double().eval()
    with torch.no_grad():
        for p in m.parameters():
            p.add_(0.2 * torch.randn_like(p))
        x = torch.randn(B, L, D).double()
        got, _ = m(x, torch.arange(L).expand(B, L))
        want = torch.stack([formula(m, row) for row in x])
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_sinks_are_those_of_gpt_oss():
    from transformers.models.gpt_oss import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention, GptOssRotaryEmbedding

    torch.manual_seed(0)
    config = GptOssConfig(
        hidden_size=D, num_attention_heads=N, num_key_value_heads=2, head_dim=H, layer_types=["full_attention"],
        num_hidden_layers=1, rope_theta=10_000.0, rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        attn_implementation="eager", attention_bias=False,
    )  # fmt: skip
    theirs = GptOssAttention(config, 0).double().eval()
    torch.nn.init.normal_(theirs.sinks)
    ours = attention.build("sinks", d_model=D, n_heads=N, head_dim=H, n_kv_heads=2).double().eval()
    with torch.no_grad():
        ours.qkv.weight.copy_(torch.cat([theirs.q_proj.weight, theirs.k_proj.weight, theirs.v_proj.weight]))
        ours.o.weight.copy_(theirs.o_proj.weight)
        ours.sink.copy_(theirs.sinks)
        x, at = torch.randn(B, L, D).double(), torch.arange(L).expand(B, L)
        future = torch.full((L, L), -torch.inf, dtype=torch.float64).triu(1)[None, None]
        want, _ = theirs(x, GptOssRotaryEmbedding(config)(x, at), future)
        got, _ = ours(x, at)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)  # their angles are float32


@pytest.mark.parametrize("n_heads", [1, 2, 3, 6, 8, 12, 20, 33])
def test_slopes_are_those_of_bloom(n_heads):
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    theirs = build_alibi_tensor(torch.ones(1, 3), n_heads, torch.float64).view(n_heads, 3)
    torch.testing.assert_close(torch.tensor(slopes(n_heads), dtype=torch.float64), theirs[:, 1], rtol=1e-6, atol=0)


def test_forgetting_keeps_its_precision_over_thousands_of_tokens_in_bfloat16():
    torch.manual_seed(0)
    exact = attention.build("fox", forget_bias=1.0).double().eval()
    narrow = attention.build("fox", forget_bias=1.0).to(torch.bfloat16).eval()
    narrow.load_state_dict(exact.state_dict())
    exact.load_state_dict(narrow.state_dict())
    x = torch.randn(1, 2500, 64).to(torch.bfloat16)
    at = torch.arange(2500)[None]
    with torch.no_grad():
        want, got = exact(x.double(), at)[0], narrow(x, at)[0]
    assert ((got - want).norm(dim=-1) / want.norm(dim=-1)).amax() < 0.1  # one rounding is 0.004


MASKS = {"plain": Mask(plain=True), "window": Mask(window=20), "causal": CAUSAL}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("L", "S"), [(150, 150), (1, 70), (37, 90)])
@pytest.mark.parametrize("impl", ["sdpa", "flex"])
def test_kernels_agree_on_scores_rests_and_parts(impl, L, S, mask):
    def leaves(*shape):
        return torch.randn(*shape, dtype=torch.float64).requires_grad_(impl != "flex")

    torch.manual_seed(0)
    q, k = [leaves(2, L, 4, 8), leaves(2, L, 4, 4)], [leaves(2, S, 2, 8), leaves(2, S, 1, 4)]
    v, rest = leaves(2, S, 2, 6), leaves(4)
    of_query, of_key = [leaves(1, L, 4), leaves(2, L, 1)], [leaves(2, S, 4)]
    k_pos = torch.arange(S).expand(2, S)
    q_pos = k_pos[:, S - L :]
    if mask != "plain":
        k_pos, q_pos = (torch.stack([at[0], (at[0] - 5).clamp(min=-1)]) for at in (k_pos, q_pos))
    keep = torch.rand(2, 1, L, S) > 0.3 if mask == "window" else None

    def score(z, a, b, c):
        return 3 * torch.tanh((a * z - b + c) / 3)

    found = []
    for kernel in (impl, "reference"):
        more = {"score": score, "of_query": of_query, "of_key": of_key, "rest": rest, "keep": keep}
        y = attend(q, k, v, q_pos, k_pos, MASKS[mask], impl=kernel, **more)
        every = [*q, *k, v, rest, *of_query, *of_key]
        weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        found.append([y, *(torch.autograd.grad((y * weights).sum(), every) if impl != "flex" else [])])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


Q, AT, LEARNS = torch.randn(1, 3, 2, 4), torch.arange(3)[None], torch.ones(1, requires_grad=True)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"rest": torch.zeros(3)}, "rest is (3,): give a tensor of 2 logits"),
        ({"of_key": [Q]}, "of_key has (1, 3, 2, 4): give tensors B|1 S N|1, here 1|1 3 2|1"),
        ({"of_key": [Q[..., 0]]}, "there is no score"),
        ({"score": lambda z: z * LEARNS}, "score reads a tensor that learns"),
    ],
)
def test_scores_that_do_not_fit_are_refused(more, words):
    with pytest.raises(UserError) as caught:
        attend(Q, Q, Q, AT, AT, **more)
    assert words in str(caught.value)


@pytest.mark.parametrize(("name", "value"), [("rest", 1.0), ("of_query", [1.0]), ("score", 3)])
def test_scores_of_another_kind_are_refused(name, value):
    with pytest.raises((UserError, TypeError)) as caught:
        attend(Q, Q, Q, AT, AT, **{"score": torch.add, name: value})
    assert name in str(caught.value)


def test_parts_that_do_not_fit_are_refused():
    for q, k in (((Q, Q), (Q,)), ((), ()), ((Q, Q), (Q, Q[..., :2])), ((Q,), (Q[:, :2],))):
        with pytest.raises(UserError):
            attend(q, k, Q, AT, AT)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("gta", {"rope_dim": 3}, "rope_dim is 3: give an even number"),
        ("gta", {"rope_dim": 16}, "rope_dim is 16"),
        ("gla", {"groups": 3}, "groups is 3: it must divide n_heads, 4"),
        ("fox", {"forget_bias": 1e9}, "forget_bias"),
        ("sinks", {"window": 0}, "window"),
        ("gqa", {"cap": -1.0}, "cap"),
    ],
)
def test_options_that_make_no_sense_are_refused(name, options, words):
    with pytest.raises(UserError, match=words):
        attention.build(name, **options)
