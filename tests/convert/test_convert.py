"""Conversion: exact where it must be, best where it says so, honest everywhere."""

from __future__ import annotations

import json
import types
from dataclasses import replace

import pytest
import torch
from helpers import CONVERTED as SHAPE
from helpers import batches, grown

from attnlab import attention, pretrained
from attnlab.cli.main import main
from attnlab.config import to_dict
from attnlab.convert import convert, low_rank, pooling, rotary, targets
from attnlab.convert.calibration import gather
from attnlab.convert.dense import Dense
from attnlab.data import CharTokenizer
from attnlab.errors import UserError
from attnlab.inference.generate import generate
from attnlab.laws import check_attention
from attnlab.model import Decoder, attention_configs
from attnlab.ops import rope
from attnlab.recording import record_losses
from attnlab.spec import RopeScaling

SOURCES = {
    "gpt2": replace(SHAPE, positions="learned", bias=True),
    "learned": replace(SHAPE, positions="learned"),
    "rope": SHAPE,
    "qwen2": replace(SHAPE, mechanisms=("gqa",), options={"gqa": {"n_kv_heads": 2, "bias": True, "o_bias": False}}),
    "mqa": replace(SHAPE, mechanisms=("mqa",), positions="learned"),
    "hybrid": replace(
        SHAPE, mechanisms=("sliding", "gqa"), options={"sliding": {"window": 30}, "gqa": {"n_kv_heads": 2}}
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def models() -> dict[str, Decoder]:
    return {name: grown(config) for name, config in SOURCES.items()}


@pytest.mark.parametrize("target", targets.names())
@pytest.mark.parametrize("source", SOURCES)
def test_every_source_becomes_every_target(models, source, target):
    """The certificate says what is so: it is computed again here, from the model that came out."""
    model, held_out = models[source], batches(2, 7)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    new, found = convert(model, target, calibration=batches(), held_out=held_out)
    assert new.config.mechanisms == (target,) and not new.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    with torch.no_grad():
        pairs = [(model(x[:, :-1])[0], new(x[:, :-1])[0]) for x in held_out]
        losses = [torch.stack([m.loss(x[:, :-1], x[:, 1:]) for x in held_out]).mean().item() for m in (model, new)]
    assert found.max_logit_difference == pytest.approx(max(float((a - b).abs().max()) for a, b in pairs), abs=1e-12)
    assert [found.loss_before, found.loss_after] == pytest.approx(losses, rel=1e-5)
    specs = [sum(c.cache_spec.floats(21) for c in attention_configs(m.config)) for m in (model, new)]
    assert [found.cache_bytes_before, found.cache_bytes_after] == [8 * floats for floats in specs]
    if target in ("gqa", "sliding", "mla", "gated", "moba"):  # at full width nothing is lost
        assert found.exact and found.max_logit_difference < 1e-9 and max(found.layer_errors) < 1e-9
    if "mka" in target:  # but for the gate, which starts near the tokens themselves
        assert found.max_logit_difference < 0.1 * float(pairs[0][0].std()) and max(found.layer_errors) < 0.05

    with torch.no_grad():  # what decodes is what was converted
        whole = new(held_out[0][:, :9])[0]
        cache = new.empty_cache(3, 9)
        steps = []
        for t in range(9):
            logits, cache = new(held_out[0][:, t : t + 1], cache=cache)
            steps.append(logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-9, atol=1e-9)


LAWS = ["causality", "batch independence", "chunks", "left padding", "plain path"]


@pytest.mark.parametrize("target", targets.names())
def test_a_converted_layer_obeys_the_laws(models, target):
    new, _ = convert(models["rope"], target, calibration=batches())
    results = check_attention(new.blocks()[0].attention, laws=LAWS)
    assert len(results) == len(LAWS) and sum(r.status == "holds" for r in results) >= 4


@pytest.mark.parametrize("source", ["gpt2", "learned", "qwen2", "rope"])
@pytest.mark.parametrize("method", ["svd", "aware"])
def test_latents_lose_less_with_every_rank(models, source, method):
    text = {"calibration": batches(), "held_out": batches(1, 7)}
    errors = [
        convert(models[source], "mla", rank=rank, method=method, **text)[1].layer_errors[0] for rank in (2, 8, 16, 24)
    ]
    errors = [round(error, 9) for error in errors]
    assert errors == sorted(errors, reverse=True) and errors[0] > 3 * errors[-1]


@pytest.mark.parametrize("kind", ["yarn", "llama3", "linear"])
def test_scaled_rotary_positions_convert_exactly(kind):
    scaling = RopeScaling(kind=kind, factor=4.0, original=12, fast=32.0, magnitude=1.2 if kind == "yarn" else 1.0)
    model = grown(replace(SOURCES["qwen2"], rope_scaling=scaling))
    assert convert(model, "mla")[1].exact and convert(model, "gqa")[1].exact


def test_half_of_the_cache_is_enough_for_gpt2(models):
    """2 K H floats become D, of which 24 are half of 48."""
    _, found = convert(models["gpt2"], "mla", rank=0.5)
    assert found.exact and found.cache_share == 0.5


def test_weighted_low_rank_beats_everything_else():
    """No other pair of factors does better in the norm that was asked for; random projections come nowhere near."""
    torch.manual_seed(0)
    matrix, x, a = torch.randn(20, 12).double(), torch.randn(500, 12).double(), torch.randn(20, 20).double()
    x = x * torch.logspace(-2, 2, 12)
    moment, outputs = x.T @ x / len(x), a.T @ a

    def error(product):
        return float((a @ (matrix - product) @ x.T).square().sum())

    up, down = low_rank.low_rank(matrix, moment, outputs, rank=4)
    best = error(up @ down)
    plain = low_rank.low_rank(matrix, rank=4)
    assert best < error(plain[0] @ plain[1])
    for _ in range(30):
        basis = torch.linalg.qr(torch.randn(20, 4).double()).Q
        assert best < error(basis @ basis.T @ matrix)
        wiggled = (up + 0.01 * torch.randn_like(up)) @ (down + 0.01 * torch.randn_like(down))
        assert best < error(wiggled)
    spectrum = low_rank.spectrum(matrix, moment, outputs)
    assert best / len(x) == pytest.approx(float(spectrum[4:].sum()), rel=1e-3)


def test_mean_pooling_is_the_loop_written_out(models):
    source = Dense.of(models["gpt2"].blocks()[0].attention)
    layer = convert(models["gpt2"], "gqa", rank=2, method="mean")[0].blocks()[0].attention
    rows = layer.qkv.weight.split([24, 12, 12])
    for heads, got in ((source.k, rows[1]), (source.v, rows[2])):
        for group in range(2):
            wanted = (heads[2 * group] + heads[2 * group + 1])[:, :-1] / 2
            torch.testing.assert_close(got[6 * group : 6 * group + 6], wanted)
    assert torch.equal(rows[0], source.q.flatten(0, 1)[:, :-1])


def test_groups_that_straddle_heads_are_means_over_queries():
    """Three heads of keys for twelve queries, pooled to two: each group reads one head whole and half of another."""
    model = grown(replace(SHAPE, n_heads=12, mechanisms=("gqa",), options={"gqa": {"n_kv_heads": 3}}))
    source = Dense.of(model.blocks()[0].attention)
    pooled = pooling.mean(source, 2)
    torch.testing.assert_close(pooled.k[0], (4 * source.k[0] + 2 * source.k[1]) / 6)


@pytest.mark.parametrize("source", ["gpt2", "rope"])
def test_aligned_heads_pool_with_less_loss(models, source):
    """Heads that are one head, turned and shuffled, become one again without loss; means of them do not."""
    model = grown(SOURCES[source])
    with torch.no_grad():
        for block in model.blocks():
            parts = block.attention.qkv.weight.view(12, 6, 24)
            for kind in (parts[4:8], parts[8:12]):
                for copy, original in ((2, 0), (3, 1)):
                    turn = torch.linalg.qr(torch.randn(6, 6).double()).Q
                    if source == "rope" and kind is not parts[8:12] and kind.data_ptr() == parts[4:8].data_ptr():
                        turn = pooling.nearest_phases(torch.randn(6, 4).double(), torch.randn(6, 4).double())
                    kind[copy] = turn @ kind[original]
            if block.attention.qkv.bias is not None:
                block.attention.qkv.bias[24:] = 0
    found = {m: convert(model, "gqa", rank=2, method=m)[1] for m in ("aligned", "mean", "first")}
    assert found["aligned"].exact
    assert min(max(found[m].layer_errors) for m in ("mean", "first")) > 0.05


def test_turns_do_not_change_what_the_unpooled_layer_computes(models):
    for name in ("gpt2", "rope"):
        assert convert(models[name], "gqa", rank=4, method="aligned")[1].exact


def test_shared_rotary_keys_give_the_same_scores(models):
    """split() written out: scores of kept pairs plus scores of the rest are the original's, for any choice of pairs."""
    source = Dense.of(models["qwen2"].blocks()[0].attention)
    whole = rotary.split(source, 6)  # 2 heads of 3 pairs
    assert whole.rest.abs().max() < 1e-12
    x = torch.cat([torch.randn(2, 9, 24), torch.ones(2, 9, 1)], -1).double()
    at = torch.arange(9).expand(2, 9)
    theta = source.config.rope_theta
    q = rope(torch.einsum("nhd,bld->blnh", source.q, x), at, theta)
    k = rope(torch.einsum("khd,bld->blkh", source.k, x), at, theta).repeat_interleave(2, 2)
    q_shared = rope(torch.einsum("nrd,bld->blnr", whole.q, x), at, theta, whole.places)
    k_shared = rope(torch.einsum("rd,bld->blr", whole.k, x)[:, :, None], at, theta, whole.places)
    wanted = torch.einsum("blnh,bsnh->bnls", q, k)
    torch.testing.assert_close(torch.einsum("blnr,bsmr->bnls", q_shared, k_shared), wanted)
    some = rotary.split(source, 2, gather(models["qwen2"].float(), batches(), lambda *_: None)[0])
    assert len(some.places) == 2 and some.k.shape[0] == 4
    models["qwen2"].double()


def test_ranks_are_shared_where_they_do_most_good(models):
    text = {"calibration": batches(), "held_out": batches(1, 7)}
    even, spread = (convert(models["gpt2"], "mla", rank=8, per_layer=each, **text) for each in (False, True))
    ranks = [c.kv_rank for c in attention_configs(spread[0].config)]
    assert sum(ranks) == 16 and spread[1].cache_bytes_after == even[1].cache_bytes_after
    assert low_rank.share([torch.tensor([8.0, 1.0, 0.1]), torch.tensor([3.0, 3.0, 3.0])], 4) == [1, 3]


def test_the_indexer_learns_where_the_dense_layer_looks():
    """KL(attention || indexer) on text that it has not seen, against that of an indexer that learnt nothing."""
    model = grown(SOURCES["gpt2"])
    with torch.no_grad():  # attention that has something to say: sharper, and by the token
        for block in model.blocks():
            block.attention.qkv.weight[:48] *= 3
        model.place.weight.zero_()
    new, found = convert(model, "msla", calibration=batches(12), options={"top_k": 4, "local": 0})
    assert not found.exact  # and the dense lessons are over:
    assert all(int(block.attention.calls) == block.attention.config.warmup for block in new.blocks())
    divergence = []
    for taught in (True, False):
        with record_losses() as losses:
            for block in new.blocks():
                layer = block.attention
                layer.calls.zero_()
                if not taught:
                    for name in ("index_q", "index_k", "index_w"):
                        torch.nn.init.normal_(getattr(layer, name).weight, std=0.02)
            new.train()(batches(1, 99)[0])
        divergence.append(float(torch.stack(losses["indexer"]).mean()))
    assert divergence[0] < 0.95 * divergence[1]


def test_sliding_is_exact_within_its_window(models):
    new, found = convert(models["rope"], "sliding", rank=8)
    x = batches(1)[0]
    with torch.no_grad():
        apart = (new(x)[0] - models["rope"](x)[0]).abs().amax((0, 2))
    assert apart[:8].max() < 1e-9 < 1e-4 < apart[8:].max() and not found.exact
    assert found.cache_share == pytest.approx(8 / 21)


def test_a_share_of_the_cache_is_kept(models):
    for target in ("gqa", "mla", "msla", "mka", "sliding"):
        new, found = convert(models["rope"], target, rank=0.6, calibration=batches())
        assert 0.2 < found.cache_share <= 0.6, target
        assert new.config == type(new.config)(**{f: getattr(new.config, f) for f in new.config.__dataclass_fields__})
    ints = convert(models["rope"], "gqa", rank=2)[0]
    assert attention_configs(ints.config)[0].n_kv_heads == 2


@pytest.mark.parametrize(
    ("source", "target", "fields", "said"),
    [
        ("gpt2", "mla", {"rank": 25}, "kv_rank 25 does not fit this model: give 1 to 24"),
        ("gpt2", "mla", {"rank": 0}, "kv_rank 0 does not fit"),
        ("gpt2", "gqa", {"rank": 3}, "give one of 1, 2, 4"),
        ("qwen2", "gqa", {"rank": 4}, "give 1 to 2"),
        ("gpt2", "mla", {"rank": 1.5}, "no share of the cache"),
        ("gpt2", "sliding", {"rank": 0.01}, "too little"),
        ("gpt2", "mqa", {"rank": 2}, "leave it out"),
        ("gpt2", "mlaa", {}, "did you mean 'mla'"),
        ("gpt2", "mla", {"method": "mean"}, "expected one of svd, aware"),
        ("gpt2", "mla", {"method": "aware"}, "calibration text"),
        ("gpt2", "msla", {}, "calibration text"),
        ("gpt2", "gqa", {"per_layer": True}, "latent"),
        ("gpt2", "mla", {"rank": 4, "options": {"kv_rank": 5}}, "leave one of them out"),
        ("gpt2", "mla", {"options": {"kv_rnk": 5}}, "did you mean 'kv_rank'"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_said(models, source, target, fields, said):
    with pytest.raises(UserError, match=said):
        convert(models[source], target, **fields)


def test_sources_that_cannot_be_converted():
    for name in ("mla", "mka", "mlp_latent"):  # mla becomes mla and nothing else
        with pytest.raises(UserError, match=f"a layer of {name} cannot be converted"):
            convert(grown(replace(SHAPE, mechanisms=(name,))), "gqa")
    normed = grown(replace(SHAPE, options={"mha": {"qk_norm": 1e-6}}))
    assert convert(normed, "gqa")[1].exact and convert(normed, "sliding")[1].exact
    with pytest.raises(UserError, match="norm"):
        convert(normed, "gqa", rank=2, method="aligned")


TEXT = "the quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs\n" * 30


@pytest.fixture
def stored(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    tokenizer = CharTokenizer.of(TEXT)
    model = grown(replace(SOURCES["gpt2"], vocab_size=tokenizer.vocab_size)).float()
    pretrained.save(pretrained.Loaded(model, tokenizer, "source", "attnlab"), tmp_path / "source")
    return tmp_path


def test_the_command(stored, capsys):
    words = ["convert", "source", "--to", "mla", "--rank", "0.25", "--data", "text:text.txt", "--calibrate", "2"]
    assert main([*words, "--out", "new"]) == 0
    shown = capsys.readouterr().out
    assert "25.0%" in shown and "aware" in shown
    certificate = json.loads((stored / "new" / "certificate.json").read_text())
    loaded = pretrained.load("new")
    assert loaded.model.config.mechanisms == ("mla",) and loaded.tokenizer.chars == "".join(sorted(set(TEXT)))
    assert certificate["model"] == "source" and certificate["calibration_tokens"] == 2 * 8 * 21
    assert certificate["options"] == to_dict(loaded.model.config)["options"]
    assert len(generate(loaded.model, [[1, 2, 3]], 4)[0]) == 4
    assert main([*words, "--out", "new"]) == 2 and "holds something already" in capsys.readouterr().err


def test_nothing_is_written_for_bad_input(stored, capsys):
    for words in (["--to", "mla", "--rank", "99"], ["--to", "lma"], ["--to", "mla", "--rank", "half"]):
        assert main(["convert", "source", *words, "--data", "text:text.txt", "--out", "bad"]) == 2
        assert capsys.readouterr().err.count("\n") == 1
        assert not (stored / "bad").exists()
    assert main(["convert", "nowhere", "--to", "mla", "--out", "bad"]) == 2 and not (stored / "bad").exists()


def test_a_grid_is_a_report(stored, capsys):
    pytest.importorskip("plotly", reason="plotly is not installed: pip install 'attnlab[report]'")
    words = [
        "--to",
        "mla",
        "--grid",
        "0.5,0.25",
        "--data",
        "text:text.txt",
        "--calibrate",
        "2",
        "--out",
        "grid",
        "--json",
    ]
    assert main(["convert", "source", *words]) == 0
    found = json.loads(capsys.readouterr().out)
    ways = ("mla", "svd"), ("mla", "aware"), ("gqa", "mean")
    assert [(c["target"], c["method"], c["rank"]) for c in found] == [(*w, rank) for w in ways for rank in (0.5, 0.25)]
    page = (stored / "grid" / "report.html").read_text()
    assert "held-out loss (nats per token)" in page and "mla, aware" in page and "gqa, mean" in page


def test_every_target_is_a_mechanism():
    assert set(targets.names()) <= set(attention.names())


def test_heads_that_turn_in_part_are_refused():
    model = Decoder(replace(SHAPE, options={"mha": {"rope_dim": 4}}))
    with pytest.raises(UserError, match="the source turns 4 of 6 dimensions of a head, and cannot be converted"):
        convert(model, "gqa")


def test_a_mechanism_of_ones_own_says_how_it_is_made(monkeypatch):
    """A module like an installed package's, whose own `weights_from` is found; what it makes is checked by name."""
    made = types.ModuleType("somebodys")
    made.Config, made.Attention = attention.module("gated").Config, attention.module("gated").Attention
    made.weights_from = attention.module("gated").weights_from
    known = attention.module
    monkeypatch.setattr(attention, "names", lambda: [*attention._own(), "somebodys"])
    monkeypatch.setattr(attention, "defines", lambda name, function: name == "somebodys")
    monkeypatch.setattr(attention, "module", lambda name: made if name == "somebodys" else known(name))
    source = grown(SOURCES["qwen2"])
    new, found = convert(source, "somebodys", options={"elementwise": True})
    assert found.exact and found.method == "own" and new.config.options["somebodys"]["n_kv_heads"] == 2
    assert convert(source, "somebodys", rank=2)[1].exact
    with pytest.raises(UserError, match=r"with these options qkv\.weight has the shape"):
        convert(source, "somebodys", rank=1)
    with pytest.raises(UserError, match="unknown method of a conversion to somebodys 'svd': expected one of own"):
        convert(source, "somebodys", method="svd")
    made.weights_from = lambda source, config: {"nothing": source.q}
    with pytest.raises(UserError, match="the conversion makes nothing, and the layer has no such tensor: it has qkv"):
        convert(source, "somebodys")
    made.weights_from = lambda source, config: [source.q]
    with pytest.raises(UserError, match="weights_from of somebodys returned list: it must return tensors by name"):
        convert(source, "somebodys")


def test_a_function_is_found_without_an_import():
    assert attention.defines("gated", "weights_from") and not attention.defines("mha", "weights_from")
    assert not attention.defines("no_such_thing", "weights_from")


WINDOWED = replace(SHAPE, mechanisms=("sliding",), options={"sliding": {"window": 7, "n_kv_heads": 2}})
MIXED = replace(WINDOWED, mechanisms=("mha", "sliding"))


@pytest.mark.parametrize("target", targets.names())
@pytest.mark.parametrize("config", [WINDOWED, MIXED], ids=["windowed", "mixed"])
def test_a_window_is_kept_or_the_conversion_refused(config, target):
    source = grown(config)
    if target == "sliding":
        new, found = convert(source, target)
        assert (
            found.exact
            and [c.window for c in attention_configs(new.config)] == [c.window for c in attention_configs(config)]
            if config is WINDOWED
            else found.exact
        )
        assert found.cache_share == 1
        with pytest.raises(UserError, match="window 9 does not fit this model: give 1 to 7"):
            convert(grown(WINDOWED), target, rank=9)
    else:
        layer = len(config.mechanisms) - 1
        with pytest.raises(UserError, match=f"layer {layer} of this model sees the last 7 tokens, and {target} would"):
            convert(source, target, calibration=batches())
        if target != "cla" or config is WINDOWED:
            wide, found = convert(source, target, calibration=batches(), drop_window=True)
            assert wide.config.mechanisms == (target,) and not found.exact


@pytest.mark.parametrize(
    "options", [{"q_rank": 8}, {"norm": "rms"}, {"v_dim": 4}, {"rope_places": [0.0, 0.5]}, {"head_dim": 8}]
)
def test_an_option_is_taken_or_refused(models, options):
    (name,) = options
    with pytest.raises(UserError, match=f"the option {name} is .*this conversion makes it .*: leave it out"):
        convert(models["rope"], "mla", options=options)
    for target in targets.names():
        if name in attention.module(target).Config.__dataclass_fields__:
            with pytest.raises(UserError, match=f"option {name}|with these options|no such tensor"):
                convert(models["rope"], target, calibration=batches(), options=options)


def test_options_that_say_what_is_made_anyway_are_taken(models):
    new, found = convert(models["rope"], "mla", options={"q_rank": 0, "norm": "none", "v_dim": 6, "mode": "absorbed"})
    assert found.exact and new.config.options["mla"]["mode"] == "absorbed"
    for options in ({"bias": False}, {"rope_theta": 500.0}, {"qk_norm": 0.1}, {"cap": 3.0}):
        with pytest.raises(UserError, match="this conversion makes it"):
            convert(models["qwen2"], "gqa", options=options)


def test_caps_and_rotary_bases_of_the_layers_are_kept():
    capped = grown(replace(SHAPE, options={"mha": {"cap": 2.0}}))
    for target in ("gqa", "sliding", "gated"):
        assert convert(capped, target)[1].exact
    with pytest.raises(UserError, match="caps its scores"):
        convert(capped, "mla")
    turned = grown(replace(SHAPE, options={"mha": {"rope_theta": 77.0}}))
    for target in ("gqa", "mla", "gated"):
        assert convert(turned, target)[1].exact


LATENT = {
    "plain": {"kv_rank": 12},
    "queries": {"kv_rank": 12, "q_rank": 10, "bias": True, "v_dim": 4},
    "unnormed": {"kv_rank": 10, "norm": "none", "rope_dim": 0},
}


@pytest.mark.parametrize("name", ["mla", "msla"])
@pytest.mark.parametrize("case", LATENT)
def test_latents_become_smaller_latents(name, case):
    options = LATENT[case] | ({"top_k": 6} if name == "msla" else {})
    source = grown(replace(SHAPE, mechanisms=(name,), options={name: options}))
    text = {"calibration": batches(), "held_out": batches(2, 7)}
    new, found = convert(source, name, **text)
    assert found.exact and found.cache_share == 1 and attention_configs(new.config) == attention_configs(source.config)
    errors = []
    for rank in (options["kv_rank"], 8, 4, 1):
        new, found = convert(source, name, rank=rank, **text)
        assert attention_configs(new.config)[0].kv_rank == rank
        errors.append(found.layer_errors[0])
    assert errors[0] < 1e-9 < errors[1] < errors[3]
    half = convert(source, name, rank=0.75, method="svd")[1]
    assert 0.4 < half.cache_share <= 0.75 and half.method == "svd"
    with pytest.raises(UserError, match="kv_rank 99 does not fit this model: give 1 to"):
        convert(source, name, rank=99)
    with pytest.raises(UserError, match="the option head_dim is 8, and this conversion makes it 6"):
        convert(source, name, options={"head_dim": 8})


def test_latents_that_nothing_speaks_for_are_left_out():
    source = grown(replace(SHAPE, mechanisms=("mla",), options={"mla": {"kv_rank": 8}}))
    with torch.no_grad():
        for block in source.blocks():  # keys and values read 5 of the 8 directions
            up = torch.cat([block.attention.k_up.weight, block.attention.v_up.weight])
            up = up @ torch.linalg.qr(torch.randn(8, 5).double()).Q @ torch.randn(5, 8).double()
            block.attention.k_up.weight.copy_(up[:24])
            block.attention.v_up.weight.copy_(up[24:])
    unnormed = replace(source.config, options={"mla": {"kv_rank": 8, "norm": "none"}})
    plain = Decoder(unnormed).double().eval()
    plain.load_state_dict({n: v for n, v in source.state_dict().items() if ".norm." not in n}, strict=True)
    assert convert(plain, "mla", rank=5)[1].exact and not convert(plain, "mla", rank=4)[1].exact
