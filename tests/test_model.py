"""The decoder: parameter counts, experts, hybrids, losses that ride along."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from attnlab import attention, presets
from attnlab.attention import gqa
from attnlab.config import ExpertsConfig, ModelConfig, RunConfig, TrainConfig, from_dict, to_dict
from attnlab.errors import UserError
from attnlab.feed_forward import Experts
from attnlab.layers import dropout
from attnlab.model import Decoder, attention_configs, flops_per_token
from attnlab.ops import attend
from attnlab.recording import record_attention, record_losses, with_loss
from attnlab.spec import Mask, RopeScaling

SMALL = ModelConfig(vocab_size=31, context=40, n_layers=2, d_model=32, n_heads=4)


def on_meta(config):
    with torch.device("meta"):
        return Decoder(config)


@pytest.mark.parametrize(
    ("preset", "changes", "without_positions", "count"),
    [
        ("gpt2-124m", {}, False, 124_439_808),
        ("gpt2-124m", {"vocab_size": 50304, "bias": False}, True, 123_587_328),
        ("nanogpt-mla-124m", {}, True, 120_012_288),
        ("llama-1b", {}, False, 1_235_814_400),
        ("llama-8b", {}, False, 8_030_261_248),
        ("llama-70b", {}, False, 70_553_706_496),
        ("deepseek-v3-671b", {}, False, 671_026_419_200 - 58 * 256),  # published with the biases of the experts' choice
        ("shakespeare-gpu", {}, True, 10_646_784),
    ],
)
def test_published_parameter_counts(preset, changes, without_positions, count):
    model = on_meta(replace(presets.get(preset).model, **changes))
    positions = model.place.weight.numel() if without_positions else 0
    assert model.parameter_count() - positions == count


def test_wikitext_mla_form_is_a_config():
    options = {"mla": {"head_dim": 16, "rope_dim": 16, "v_dim": 32, "q_rank": 256, "kv_rank": 341, "norm": "layer"}}
    shape = ModelConfig(vocab_size=100, d_model=512, n_heads=16, n_layers=1, mechanisms=("mla",), options=options)
    layer = on_meta(shape).layers[0].attention
    assert layer.config.cache_spec.floats(10) == 10 * (341 + 16)
    assert layer.o.in_features == 16 * 32


@pytest.mark.parametrize("name", attention.names())
def test_every_mechanism_decodes_in_a_model_as_it_reads(name):
    torch.manual_seed(0)
    model = Decoder(replace(SMALL, mechanisms=(name,))).double().eval()
    tokens = torch.randint(31, (3, 37))
    with torch.no_grad():
        whole, none = model(tokens)
        cache = model.empty_cache(3, 37)
        parts = []
        for part in tokens.split([20, 1, 1, 15], 1):
            logits, cache = model(part, cache=cache)
            parts.append(logits)
    assert none is None
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-9, atol=1e-11)


def test_hybrid_layers_follow_the_list():
    config = replace(
        SMALL, n_layers=5, mechanisms=("sliding", "sliding", "sliding", "mla"), options={"sliding": {"window": 6}}
    )
    model = on_meta(config)
    kinds = [type(layer.attention).__module__.rpartition(".")[2] for layer in model.layers]
    assert kinds == ["sliding", "sliding", "sliding", "mla", "sliding"]
    floats = [cache.spec.floats(40) for cache in model.empty_cache(1, 40)]
    assert floats == [6 * 64, 6 * 64, 6 * 64, 40 * (32 + 4), 6 * 64]


@pytest.mark.parametrize("ff", ["gelu", "relu2", "swiglu", "moe"])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_every_part_learns(ff, norm):
    torch.manual_seed(0)
    model = Decoder(replace(SMALL, ff=ff, norm=norm, n_experts=3, bias=True, tied=False, positions="learned"))
    tokens = torch.randint(31, (4, 40))
    model.loss(tokens, tokens.roll(-1, 1)).backward()
    still = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().any()]
    assert still == []


def dense_experts(m, x):
    """Every token through its experts, one token at a time."""
    out = []
    for token in x.flatten(0, -2):
        logits = m.router(token)
        chosen = (logits + m.bias).topk(m.k).indices
        weights = logits[chosen].softmax(0)
        out.append(sum(w * (m.out[i] @ F.gelu(m.into[i] @ token)) for w, i in zip(weights, chosen, strict=True)))
    return torch.stack(out).view_as(x)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_experts_equal_the_dense_reference_and_drop_nothing(k):
    torch.manual_seed(0)
    m = Experts(replace(SMALL, ff="moe", n_experts=5, experts_per_token=k, balance="bias")).double().eval()
    m.bias.copy_(torch.tensor([9.0, 0, 0, 0, 0]))  # nearly everybody wants expert 0: a capacity would drop tokens
    x = torch.randn(3, 17, 32, dtype=torch.float64, requires_grad=True)
    got, want = m(x), dense_experts(m, x)
    torch.testing.assert_close(got, want)
    inputs = [x, m.into, m.out]
    weight = torch.randn_like(got)
    for a, b in zip(
        torch.autograd.grad((want * weight).sum(), inputs),
        torch.autograd.grad((got * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_balance_loss_is_one_when_even_and_pulls_load_apart_when_not():
    torch.manual_seed(0)
    m = Experts(replace(SMALL, ff="moe", n_experts=4, experts_per_token=1)).double()
    x = torch.randn(1, 400, 32).double()
    with torch.no_grad():
        m.router.weight.zero_()
    with record_losses() as losses:
        m(x)
    assert losses["balance"][0].item() == pytest.approx(1.0)
    with torch.no_grad():
        m.router.weight[2] = x.mean((0, 1)) * 20 + 0.3
    with record_losses() as losses:
        (0 * m(x).sum()).backward()
    assert losses["balance"][0].item() > 1.05
    assert m.router.weight.grad.abs().max() > 0


def test_bias_balancing_moves_load_without_a_loss():
    torch.manual_seed(0)
    m = Experts(replace(SMALL, ff="moe", n_experts=4, experts_per_token=1, balance="bias"))
    x = torch.randn(1, 512, 32) + 1

    def unevenness():
        counts = torch.bincount((m.router(x.flatten(0, 1)) + m.bias).argmax(-1), minlength=4)
        return (counts / counts.sum() - 0.25).abs().max()

    before = unevenness()
    with record_losses() as losses:
        for _ in range(3000):
            m.even_out(
                x,
                m.router(x.flatten(0, 1)),
                torch.bincount((m.router(x.flatten(0, 1)) + m.bias).argmax(-1), minlength=4),
            )
            m.move_bias()
    assert not losses
    assert unevenness() < 0.5 * before


def test_with_loss_leaves_the_value_and_adds_the_gradient():
    w, x = torch.tensor(3.0, requires_grad=True), torch.tensor([1.0, 2.0], requires_grad=True)
    y = with_loss(x * 1, "penalty", w**2, 0.5)
    assert torch.equal(y, x)
    y.sum().backward()
    assert w.grad == 3.0  # 0.5 * 2 w
    assert torch.equal(x.grad, torch.ones(2))


def test_attention_maps_come_layer_by_layer():
    model = Decoder(replace(SMALL, mechanisms=("mla", "gqa"))).eval()
    with record_attention() as maps:
        model(torch.randint(31, (2, 9)))
    model(torch.randint(31, (2, 9)))
    assert [tuple(m.shape) for m in maps] == [(2, 4, 9, 9)] * 2
    torch.testing.assert_close(maps[0].sum(-1), torch.ones(2, 4, 9))


@pytest.mark.parametrize("name", presets.names())
def test_flops_are_about_two_per_parameter(name):
    config = presets.get(name).model
    model = on_meta(config)
    active = model.parameter_count()
    idle = 1 - config.experts_per_token / config.n_experts
    active -= idle * sum(e.into.numel() + e.out.numel() for e in model.modules() if isinstance(e, Experts))
    if config.positions == "learned":
        active -= config.context * config.d_model
    if not config.tied:
        active -= config.vocab_size * config.d_model
    context = min(config.context, 4096)  # in longer ones scores cost more than weights
    assert 2 * active <= flops_per_token(config, context) < 3.2 * active


def test_config_survives_json_and_its_key_ignores_the_name():
    run = RunConfig(
        model=replace(SMALL, mechanisms=("sliding", "mla"), options={"mla": {"kv_rank": 8}}),
        train=TrainConfig(betas=(0.8, 0.9)),
    )
    again = from_dict(RunConfig, to_dict(run))
    assert again == run
    assert again.key == run.key == replace(run, name="other").key
    assert replace(run, seed=1).key != run.key


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: replace(SMALL, d_model=33), ["33", "4", "n_heads"]),
        (lambda: on_meta(replace(SMALL, mechanisms=("mlla",))), ["mlla", "did you mean 'mla'"]),
        (lambda: on_meta(replace(SMALL, mechanisms=("msla",), options={"msla": {"top_k": 41}})), ["41", "40", "msla"]),
        (lambda: on_meta(replace(SMALL, mechanisms=("gqa",), options={"gqa": {"n_kv_heads": 3}})), ["3", "1, 2, 4"]),
        (lambda: on_meta(replace(SMALL, mechanisms=("mla",), options={"mla": {"kv_rnk": 3}})), ["kv_rnk", "kv_rank"]),
        (lambda: replace(SMALL, options={"mla": {"kv_rank": 3}}), ["mla", "no layer"]),
        (lambda: replace(SMALL, ff="moe", experts_per_token=9), ["9", "8"]),
        (lambda: ExpertsConfig(kind="gleu"), ["gleu", "did you mean 'gelu'"]),
        (lambda: ExpertsConfig(shared=-1), ["shared is -1"]),
        (lambda: replace(SMALL, ff="moe", experts=ExpertsConfig(groups=3)), ["3 groups", "8 experts", "equal"]),
        (lambda: replace(SMALL, ff="moe", experts=ExpertsConfig(groups=8), experts_per_token=2), ["1 of 8 groups"]),
        (lambda: RopeScaling(kind="yarnn"), ["yarnn", "did you mean 'yarn'"]),
        (lambda: RopeScaling(kind="yarn", slow=4, fast=1), ["slow is 4", "fast 1"]),
        (lambda: on_meta(replace(SMALL, mechanisms=("gqa",), options={"gqa": {"qk_norm": -1.0}})), ["qk_norm", "-1"]),
        (
            lambda: on_meta(replace(SMALL, mechanisms=("msla",), options={"msla": {"shipped": True}})),
            ["shipped", "q_rank"],
        ),
        (lambda: on_meta(replace(SMALL, impl="flash")), ["flash", "sdpa"]),
        (lambda: from_dict(RunConfig, {"model": {"n_layer": 3}}), ["n_layer", "n_layers"]),
        (lambda: presets.get("quik"), ["quik", "'quick'"]),
        (lambda: TrainConfig(optimizer="sgd"), ["sgd", "adamw, muon"]),
        (lambda: Decoder(replace(SMALL, positions="learned")).empty_cache(1, 41), ["41", "40", "learned"]),
        (lambda: Decoder(replace(SMALL, positions="learned"))(torch.zeros(1, 41, dtype=torch.int64)), ["41", "40"]),
    ],
)
def test_bad_input_is_one_sentence(make, words):
    with pytest.raises(UserError) as error:
        make()
    text = str(error.value)
    assert all(word in text for word in words), text
    assert "\n" not in text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_zeroes_its_share_and_keeps_the_mean(dtype):
    torch.manual_seed(0)
    x = torch.full((3, 70_001), 2.0, dtype=dtype, requires_grad=True)
    y = dropout(x, 0.2)
    assert (y == 0).float().mean().item() == pytest.approx(0.2, abs=0.005)
    assert y.float().mean().item() == pytest.approx(2.0, abs=0.02)
    assert not torch.equal(y, dropout(x, 0.2))
    y.sum().backward()
    torch.testing.assert_close(x.grad, y.detach() / 2)
    assert dropout(x, 0.0) is x


def padded(B, T):
    at = torch.arange(T).expand(B, T).clone()
    at[1] = (at[1] - 9).clamp(min=-1)
    return at


@pytest.mark.parametrize(
    "mask", [Mask(plain=True), Mask(plain=True, window=20), Mask()], ids=["causal", "window", "padded"]
)
def test_attention_with_dropout_is_attention(mask):
    torch.manual_seed(0)
    B, T = 2, 150
    at = torch.arange(T).expand(B, T) if mask.plain else padded(B, T)
    leaves = [torch.randn(B, T, n, 8, dtype=torch.float64, requires_grad=True) for n in (4, 2, 2)]
    want = attend(*leaves, at, at, mask, impl="reference")
    got = attend(*leaves, at, at, mask, dropout=1e-9)  # so rare that nothing goes
    torch.testing.assert_close(got, want)
    weight = torch.randn_like(want)
    for a, b in zip(
        torch.autograd.grad((got * weight).sum(), leaves),
        torch.autograd.grad((want * weight).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    few = [leaf.detach()[:, :70, :2].requires_grad_() for leaf in leaves]

    def dropped(*qkv):
        torch.manual_seed(1)
        return attend(*qkv, at[:, :70], at[:, :70], mask, dropout=0.4)

    assert not torch.equal(dropped(*few), attend(*few, at[:, :70], at[:, :70], mask))
    assert torch.autograd.gradcheck(dropped, few, fast_mode=True)
    mean = torch.stack([attend(*leaves, at, at, mask, dropout=0.3).detach() for _ in range(300)]).mean(0)
    assert (mean - want).abs().mean() < 0.05 * want.abs().mean()


def test_one_layer_may_have_options_of_its_own():
    options = {"mla": {"kv_rank": 8, "norm": "none"}, "mla@2": {"kv_rank": 12}}
    config = ModelConfig(n_layers=4, d_model=32, n_heads=2, mechanisms=("mha", "mla", "mla"), options=options)
    assert [getattr(each, "kv_rank", 0) for each in attention_configs(config)] == [0, 8, 12, 0]
    assert {getattr(each, "norm", "none") for each in attention_configs(config)} == {"none"}
    for wrong in ("mla@0", "mla@4", "mla@x"):
        with pytest.raises(UserError, match=wrong):
            replace(config, options={wrong: {"kv_rank": 8}})


def fill(layer: torch.nn.Linear) -> None:
    layer.bias.data.fill_(5.0)


def swap(layer: torch.nn.Linear) -> None:
    layer.bias = torch.nn.Parameter(torch.full_like(layer.bias, 5.0))


def plainly(layer: torch.nn.Linear) -> None:
    torch.nn.init.constant_(layer.bias, 5.0)


@pytest.mark.parametrize("how", [fill, swap, plainly])
def test_weights_that_a_mechanism_sets_itself_stay(how: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Sets(gqa.Attention):
        def __init__(self, config: gqa.Config) -> None:
            super().__init__(config)
            self.forget = torch.nn.Linear(config.d_model, 3)
            how(self.forget)

    monkeypatch.setattr(gqa, "Attention", Sets)
    torch.manual_seed(0)
    model = Decoder(replace(SMALL, mechanisms=("gqa",), bias=True))
    for block in model.blocks():
        assert bool((block.attention.forget.bias == 5).all())
        assert 0.015 < block.attention.forget.weight.std() < 0.025, "what it left alone follows the rule"
        assert not block.attention.qkv.bias.any()
