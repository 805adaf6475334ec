"""Inside the heads: a circuit built by hand scores 1 where it should, and chance scores as chance."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from attnlab import Decoder, ModelConfig, TrainConfig, UserError, attention, load_model, presets
from attnlab.cli import main as cli
from attnlab.heads import (
    ablate,
    head_scores,
    inside,
    pattern_scores,
    repeated,
    scores_over_training,
    value_sizes,
    watch,
)
from attnlab.heads.memory import angles
from attnlab.heads.scores import segment_lengths
from attnlab.recording import Maps, record_attention, shared
from attnlab.stats import beyond, holm, welch

VOCAB, PLACES = 24, 32
WIDTH = 2 * VOCAB + PLACES  # a token, the token before it, a position: each one-hot in a place of its own


def induction_circuit() -> Decoder:
    """Two layers, two heads. Layer 0, head 1 copies the previous token into a place of its own; layer 1, head 0 looks
    for the token that came after an earlier copy of this one, and writes it out. The other two heads do nothing."""
    config = ModelConfig(
        vocab_size=VOCAB,
        context=PLACES,
        n_layers=2,
        d_model=WIDTH,
        n_heads=2,
        head_dim=PLACES,
        positions="learned",
        norm="rms",
        tied=False,
    )
    model = Decoder(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for norm in (model.norm, *(n for b in model.blocks() for n in (b.attention_norm, b.ff_norm))):
            norm.weight.fill_(1.0)
        token, before, place = slice(0, VOCAB), slice(VOCAB, 2 * VOCAB), slice(2 * VOCAB, WIDTH)
        model.embed.weight[:, token] = torch.eye(VOCAB).double()
        model.place.weight[:, place] = torch.eye(PLACES).double()
        model.head.weight[:, token] = torch.eye(VOCAB).double() * 8

        def rows(layer: int, part: int, head: int) -> torch.Tensor:  # of q, k or v
            return model.layers[layer].attention.qkv.weight[(2 * part + head) * PLACES :][:PLACES]

        def columns(layer: int, head: int) -> torch.Tensor:
            return model.layers[layer].attention.o.weight[:, head * PLACES :][:, :PLACES]

        rows(0, 0, 1)[:, place] = 100 * torch.eye(PLACES).double()  # asks for position t - 1
        shift = torch.zeros(PLACES, PLACES).double()
        shift[torch.arange(1, PLACES), torch.arange(PLACES - 1)] = 100.0
        rows(0, 1, 1)[:, place] = shift
        rows(0, 2, 1)[:VOCAB, token] = torch.eye(VOCAB).double()
        columns(0, 1)[before, :VOCAB] = torch.eye(VOCAB).double()
        rows(1, 0, 0)[:VOCAB, token] = 100 * torch.eye(VOCAB).double()
        rows(1, 1, 0)[:VOCAB, before] = 100 * torch.eye(VOCAB).double()
        rows(1, 1, 0)[:VOCAB, place.start] = -100  # what stands at position 0 had no token before it
        rows(1, 2, 0)[:VOCAB, token] = torch.eye(VOCAB).double()
        columns(1, 0)[token, :VOCAB] = 10 * torch.eye(VOCAB).double()
    return model


def small(mechanism: str, **changes: object) -> Decoder:
    torch.manual_seed(7)
    settings = {"vocab_size": 40, "context": 48, "n_layers": 2, "d_model": 32, "n_heads": 4} | changes
    return Decoder(ModelConfig(mechanisms=(mechanism,), **settings)).eval()


def test_a_circuit_built_by_hand_scores_one_on_the_right_heads() -> None:
    found = head_scores(induction_circuit(), sequences=16, segments=[8, 13])
    scores = found.scores
    assert scores["previous token"][0][1] == pytest.approx(1, abs=1e-9)
    assert scores["induction"][1][0] == pytest.approx(1, abs=1e-9)
    assert scores["copying"][1][0] == 1.0, "it raises no logit but that of the token it reads"
    assert found.marked["induction"] == [[False, False], [True, False]]
    assert found.marked["previous token"] == [[False, True], [False, False]]
    assert max(found.not_repeated["induction"][1]) < 0.3
    silent = scores["entropy"][0][0]  # all scores equal: uniform over what is there
    uniform = [math.log(t + 1) for n in (8, 13) for t in range(2 * n)]
    by_length = (sum(uniform[:16]) / 16 + sum(uniform[16:]) / 26) / 2
    assert silent == pytest.approx(by_length, abs=1e-9)
    assert scores["copying"][0][0] == 0.5, "a head that writes nothing raises no logit above another"


def test_without_the_circuit_the_second_half_cannot_be_told() -> None:
    found = ablate(induction_circuit(), sequences=12, segment=9)
    assert found.second_half < 0.5 < found.first_half
    effect = found.change
    assert effect[1][0] > 2 and effect[0][1] > 2, "the loss needs both heads of the circuit"
    assert effect[0][0] == pytest.approx(0, abs=1e-9) and effect[1][1] == pytest.approx(0, abs=1e-9)
    low, high = found.change_interval[1][0]
    assert low < effect[1][0] < high
    assert len(found.loss_by_position) == 17


@pytest.mark.parametrize("mechanism", ["mha", "mqa", "mla", "mka"])
@pytest.mark.parametrize("segments", [[24], [6, 12]])
def test_random_weights_score_at_the_null(mechanism: str, segments: list[int]) -> None:
    """With many sequences too: chance makes heads that differ from each other, and none of them is a finding."""
    found = head_scores(small(mechanism), sequences=64, segments=segments)
    assert not any(mark for layers in found.marked.values() for row in layers for mark in row)


def test_large_random_weights_score_at_their_own_null() -> None:
    def large(seed: int) -> Decoder:
        torch.manual_seed(seed)
        model = Decoder(small("mha").config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(4 if parameter.ndim > 1 else 1)
        return model

    found = head_scores(large(99), untrained=map(large, range(8)), sequences=32, segments=[20])
    spread = torch.tensor(found.scores["previous token"]).std()
    assert spread > 1e-3, "these heads differ"
    assert not any(mark for layers in found.marked.values() for row in layers for mark in row)


@pytest.mark.parametrize(
    ("context", "expected"),
    [(9, [4]), (35, [4, 8, 17]), (64, [8, 16, 32]), (1024, [32, 64, 128]), (10**6, [32, 64, 128])],
)
def test_several_lengths_whatever_the_context(context: int, expected: list[int]) -> None:
    assert segment_lengths(ModelConfig(context=context)) == expected


def test_progress_is_told_batch_by_batch_and_ends_at_the_end() -> None:
    told: list[tuple[int, int]] = []
    head_scores(
        small("mha"), sequences=9, segments=[5, 8], batch_size=4, tell=lambda _, done, of: told.append((done, of))
    )
    assert [of for _, of in told] == [2 * (9 + 9 + 8 * 2)] * len(told) and told[-1][0] == told[-1][1]
    assert [done for done, _ in told][:3] == [4, 8, 9] and sorted(told) == told


def test_samples_of_several_lengths_are_their_means() -> None:
    model = small("mha")
    apart = [head_scores(model, sequences=4, segments=[n]).scores for n in (7, 20)]
    joined = head_scores(model, sequences=4, segments=[20, 7, 7])
    assert joined.segments == [7, 20]
    for name in ("induction", "entropy"):
        mean = (torch.tensor(apart[0][name]) + torch.tensor(apart[1][name])) / 2
        torch.testing.assert_close(torch.tensor(joined.scores[name]), mean)


SOFTMAX = [name for name in attention.names() if "mixing" not in attention.module(name).Config.breaks]


@pytest.mark.parametrize("mechanism", SOFTMAX)
def test_every_query_gives_all_its_attention_to_tokens_it_may_see(mechanism: str) -> None:
    model, tokens = small(mechanism), repeated(40, 3, 21, 0)
    plain, _ = model(tokens)
    with watch(model) as layers:
        watched, _ = model(tokens)
    assert torch.equal(plain, watched), "watching changes nothing"
    assert len(layers) == 2
    for layer in layers:
        pattern = layer.pattern()
        assert pattern.shape == (3, 4, 42, 42)
        given = pattern.sum(-1)
        if layer.config.signed or mechanism == "gated":  # the weights are no shares of one whole
            told = sum(shared(weights, call).sum(-1) for weights, call in zip(layer.maps, layer.calls, strict=True))
            torch.testing.assert_close(given, told.repeat_interleave(4 // told.shape[1], 1), atol=1e-5, rtol=0)
        elif any(call.rest for call in layer.calls):  # a sink takes its part
            assert 0 < given.min() and given.max() < 1
        else:
            torch.testing.assert_close(given, torch.ones(3, 4, 42), atol=1e-5, rtol=0)
        assert pattern.triu(1).abs().max() == 0


@pytest.mark.parametrize("mechanism", SOFTMAX)
def test_the_pattern_is_what_moves_the_output(mechanism: str) -> None:
    """A head's answer at t cannot change with a token to which it and every mixing step before it give no weight; and
    what the layer wrote, through its output matrix, is what the layer adds."""
    model, tokens = small(mechanism, n_layers=1).double(), repeated(40, 2, 11, 0)
    block = model.blocks()[0]
    added = []
    block.attention.register_forward_hook(lambda module, inputs, output: added.append(output[0]))
    with watch(model) as layers:
        model(tokens)
    wrote = block.attention.o(layers[0].wrote.flatten(2))
    if not hasattr(block.attention, "latent"):  # mlp_latent adds its input and a norm of its own after it
        torch.testing.assert_close(added[0], wrote)


@pytest.mark.parametrize("mechanism", ["mha", "gqa", "mla", "msla", "sliding", "fast_mka"])
def test_values_are_what_a_lone_look_writes(mechanism: str) -> None:
    model, tokens = small(mechanism, n_layers=1).double(), repeated(40, 2, 9, 0)
    with watch(model) as layers:
        model(tokens)
    sizes = value_sizes(model, layers)[0]
    block, layer = model.blocks()[0], layers[0]
    x = block.attention_norm(layer.residual)
    if mechanism in ("mha", "gqa", "sliding"):  # written out: each query head's value through its own columns
        c = layer.config
        v = block.attention.project(x, torch.arange(18).expand(2, 18))[2].repeat_interleave(
            c.n_heads // c.n_kv_heads, 2
        )
        columns = block.attention.o.weight.unflatten(1, (c.n_heads, -1))
        written = [(columns[:, n] @ v[b, t, n]).norm() for b in range(2) for n in range(c.n_heads) for t in range(18)]
        torch.testing.assert_close(sizes.flatten(0, 1), torch.stack(written).view(8, 18))
    assert sizes.shape == (2, 4, 18) and sizes.min() > 0


def test_a_mechanism_with_more_in_mind_has_no_plain_values() -> None:
    model = small("mka")
    with watch(model) as layers:
        model(repeated(40, 1, 20, 0))
    assert value_sizes(model, layers) == [None, None]


def test_a_model_that_cannot_be_watched_keeps_no_hooks() -> None:
    model = small("mha")
    attention = model.blocks()[1].attention
    attention.mix = attention.o
    del attention.o
    with pytest.raises(UserError, match="no output matrix 'o'"), watch(model):
        pass
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def dense(maps: Maps, length: int) -> list[torch.Tensor]:
    """Each map with a column per key position, wherever its keys were stored: B N L length."""
    found = []
    for weights, (_, keys) in zip(maps, maps.at, strict=True):
        column = torch.where(keys >= 0, keys, length)[:, None, None].expand_as(weights)
        found.append(weights.new_zeros(*weights.shape[:3], length + 1).scatter_add_(-1, column, weights)[..., :length])
    return found


@pytest.mark.parametrize("mechanism", SOFTMAX)
def test_maps_of_training_prefill_and_decoding_are_the_same(mechanism: str) -> None:
    """Whatever is cached, and in which order: a query looks at the same tokens."""
    model, tokens, length = small(mechanism).double(), repeated(40, 2, 13, 3), 26
    with record_attention() as whole, torch.no_grad():
        model(tokens)
    cache = model.empty_cache(2, length)
    with record_attention() as apart, torch.no_grad():
        _, cache = model(tokens[:, :11], cache=cache)
        each = len(apart)
        for t in range(11, length):
            _, cache = model(tokens[:, t : t + 1], cache=cache)
    assert each == len(whole) and len(apart) == each * (1 + length - 11)
    full, parts = dense(whole, length), dense(apart, length)
    for i, expected in enumerate(full):
        joined = torch.cat(parts[i::each], 2)
        if not model.blocks()[0].attention.config.cache_spec.rows:  # a state says no more which token it holds
            own = torch.block_diag(torch.ones(11, 11), *[torch.ones(1, 1)] * (length - 11)).bool()
            expected = expected.masked_fill(~own, 0)
        torch.testing.assert_close(joined, expected, atol=1e-6, rtol=0)
    model.train()
    with record_attention() as training:
        logits, _ = model(tokens)
        logits.sum().backward()
    assert len(training) == len(whole) and not any(weights.requires_grad for weights in training)
    for weights, evaluated, call in zip(training, whole, whole.calls, strict=True):
        given = evaluated.sum(-1)  # a memory that holds nothing yet gets no weight, and a sink takes its part
        signed = model.blocks()[0].attention.config.signed
        torch.testing.assert_close(weights.sum(-1), given if call.rest or signed else given.round())


@pytest.mark.parametrize("mechanism", ["mla", "msla"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_absorbed_maps_equal_expanded_maps(mechanism: str, dtype: torch.dtype) -> None:
    """Over whole sequences, and token by token from a cache."""
    tokens, length, maps = repeated(40, 2, 15, 3), 30, {}
    for mode in ("expanded", "absorbed"):
        model = small(mechanism, options={mechanism: {"mode": mode}}).to(dtype)
        cache = model.empty_cache(2, length)
        with record_attention() as found, torch.no_grad():
            model(tokens)
            for t in range(length):
                _, cache = model(tokens[:, t : t + 1], cache=cache)
        maps[mode] = dense(found, length)
    assert len(maps["absorbed"]) == 2 * (1 + length)
    for a, b in zip(maps["expanded"], maps["absorbed"], strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_hooks_of_residual_and_latent_while_decoding() -> None:
    model, tokens = small("mla").double(), repeated(40, 2, 6, 0)
    cache = model.empty_cache(2, 12)
    with watch(model) as whole, torch.no_grad():
        model(tokens)
    with watch(model) as steps, torch.no_grad():
        for t in range(12):
            _, cache = model(tokens[:, t : t + 1], cache=cache)
    for i, layer in enumerate(whole):
        torch.testing.assert_close(torch.cat([s.residual for s in steps[i::2]], 1), layer.residual)
        torch.testing.assert_close(torch.cat([s.latent for s in steps[i::2]], 1), layer.latent)
        torch.testing.assert_close(torch.cat([s.wrote for s in steps[i::2]], 1), layer.wrote)
    with pytest.raises(UserError, match="came after others in a cache"):
        steps[-1].pattern()


def test_scores_of_patterns_drawn_by_hand() -> None:
    n, length = 5, 10
    pattern = torch.zeros(1, 3, length, length, dtype=torch.float64)
    for t in range(length):
        pattern[0, 0, t, max(t - 1, 0)] = 1
        pattern[0, 1, t, t - n + 1 if t >= n else t] = 1
        pattern[0, 2, t, t - n if t >= n else t] = 1
    found = pattern_scores(pattern, n)
    assert found["previous token"].tolist() == [[1, 0, 0]]
    assert found["induction"].tolist() == [[0, 1, 0]]
    assert found["duplicate token"].tolist() == [[0, 0, 1]]
    assert found["entropy"].abs().max() == 0
    assert found["distance"][0].tolist() == [0.9, (n - 1) / 2, n / 2]


def test_repeats_and_their_null() -> None:
    twice, once = repeated(50, 6, 12, 1), repeated(50, 6, 12, 1, repeat=False)
    assert torch.equal(twice[:, :12], twice[:, 12:]) and torch.equal(twice[:, :12], once[:, :12])
    assert all(len(set(row.tolist())) == 12 for row in twice[:, :12])
    assert (once[:, :12] == once[:, 12:]).float().mean() < 0.2
    assert repeated(5, 2, 12, 1).max() < 5


def test_bad_input_is_one_sentence() -> None:
    with pytest.raises(UserError, match="no softmax"):
        head_scores(small("latent_lookup"), sequences=2)
    for positions in ("learned", "rope"):
        said = (
            "segments of 9, 40 tokens, each repeated once, must fit into the context .*48: give segments from 2 to 24"
        )
        with pytest.raises(UserError, match=said):
            head_scores(small("mha", positions=positions), segments=[9, 40])
    with pytest.raises(UserError, match="at least 2"):
        head_scores(small("mha"), sequences=1)
    with pytest.raises(UserError, match=r"segment of at least 4 tokens, .* which is 6: give segments from 2 to 3"):
        head_scores(small("mha", context=6))
    with pytest.raises(UserError, match="segments of 30 tokens"):
        ablate(small("mha", positions="learned"), segment=30)


def test_welch_and_holm_against_known_values() -> None:
    # SciPy: ttest_ind(..., equal_var=False) gives t = 2.05798 with 4.305 degrees of freedom; t.sf(2.05798, 4)
    assert welch([3, 4, 5, 9], [1, 2, 2, 4]) == pytest.approx(0.0543504756624618, abs=1e-12)
    assert welch([1, 2, 2, 4], [3, 4, 5, 9]) == pytest.approx(1 - 0.0543504756624618, abs=1e-12)
    assert welch([1.0, 1.0], [0.0, 0.0]) == 0 and welch([1.0, 1.0], [1.0, 1.0]) == 1
    # one more of a kind: 8 groups of 1, so Student's t of 7 degrees; t.sf(2.998, 7) = 0.01
    kind = [[float(v)] for v in range(8)]
    far = 3.5 + 2.997952 * torch.arange(8.0).std().item() * (1 + 1 / 8) ** 0.5
    assert beyond(far, kind) == pytest.approx(0.01, abs=1e-5) and beyond(7 - far, kind) == pytest.approx(0.99, abs=1e-5)
    assert beyond(1.0, [[0.0], [0.0]]) == 0 and beyond(0.0, [[0.0], [0.0]]) == 1
    assert holm([0.001, 0.02, 0.5, 0.012], 0.05) == [True, True, False, True]
    assert holm([0.03, 0.04], 0.05) == [False, False]


def test_a_latent_of_low_rank_is_seen_as_such() -> None:
    model = small("mla", options={"mla": {"kv_rank": 12, "rope_dim": 4, "norm": "none"}}).double()
    with torch.no_grad():
        for block in model.blocks():
            block.attention.down.weight[3:12] = block.attention.down.weight[:3].repeat(3, 1)
    first = inside(model, torch.randint(40, (4, 30)))[0]
    assert first.rank == 12 and 1 < first.effective_rank <= 3 + 1e-9
    assert first.variance_left[3] < 1e-12 < first.variance_left[2]
    assert len(first.path) == 30 and len(first.key_angles) == 4


def test_angles_between_subspaces() -> None:
    eye = torch.eye(6)
    found = angles(torch.stack([eye[:2], eye[[1, 0]] * 3, eye[2:4], torch.stack([eye[0], eye[4]])]))
    assert found[0] == pytest.approx([0, 0, 90, 45], abs=1e-5)


def test_an_indexer_is_compared_with_dense_attention() -> None:
    options = {"msla": {"top_k": 6, "local": 0, "warmup": 0, "kv_rank": 12, "rope_dim": 0}}
    model = small("msla", options=options).double()
    tokens = torch.randint(40, (3, 40))
    chance = inside(model, tokens)[0]
    expected = sum(6 / (t + 1) for t in range(6, 40)) / 34
    assert chance.selection_chance == pytest.approx(expected)
    assert abs(chance.selection_recall - expected) < 0.25, "an untrained indexer guesses"
    assert sum(share for _, share in chance.selection_distance) == pytest.approx(1)
    for block in model.blocks():  # one whose every token has all the room: it selects everything
        block.attention.config = replace(block.attention.config, top_k=39)
    everything = inside(model, tokens)[0]
    assert everything.selection_recall >= 38 / 39, "at most the one token that the other left out"


def test_gates_recall_and_experts() -> None:
    model = small("mka", options={"mka": {"chunk": 4}}, ff="moe", n_experts=4)
    found = inside(model, torch.randint(40, (2, 24)))
    assert found[0].mechanism == "mka" and inside(small("mha"), torch.randint(40, (2, 24)))[1].mechanism == "mha"
    assert len(found[0].gate) == 24 and all(sum(row) == pytest.approx(1, abs=1e-5) for row in found[0].gate)
    assert all(distance >= 1 for distance, _ in found[0].recalled_distance), "only chunks of the past are recalled"
    assert sum(found[1].expert_load) == pytest.approx(1) and len(found[1].expert_load) == 4
    assert inside(small("mha"), torch.randint(40, (2, 24)))[0].to_dict()["gate"] == []
    assert len(inside(small("fast_mka"), torch.randint(40, (2, 24)))[0].gate[0]) == 2


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run that kept all its checkpoints."""
    from attnlab.training.train import train

    config = presets.get("quick")
    model = replace(config.model, n_layers=2, d_model=16, n_heads=2, context=24, mechanisms=("mla",))
    steps = TrainConfig(steps=6, batch_size=2, warmup=1, eval_every=6, eval_batches=1, save_every=2, keep=0)
    out = tmp_path_factory.mktemp("heads") / "run"
    train(replace(config, model=model, train=steps), out)
    return out


def test_scores_along_training(run: Path) -> None:
    found = scores_over_training(run, sequences=4)
    assert found.steps == [2, 4, 6]
    last = head_scores(load_model(run)[0], sequences=4, segments=found.segments)
    for name, by_step in found.scores.items():
        assert torch.tensor(by_step[-1]) == pytest.approx(torch.tensor(last.scores[name]), abs=1e-6)
    assert found.second_half[-1] == pytest.approx(ablate(load_model(run)[0], sequences=4).second_half, abs=1e-6)


def test_the_command_writes_everything(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    out, png = tmp_path / "heads.json", tmp_path / "figures"
    words = ["heads", str(run), "--sequences", "3", "--emergence", "--out", str(out), "--png", str(png)]
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    assert "induction" in printed and "Holm" in printed
    assert "effective rank" in printed and "keys apart" in printed and "gate" not in printed
    found = json.loads(out.read_text())
    assert set(found) == {"source", "mechanisms", "untrained", "scores", "ablation", "inside", "patterns", "emergence"}
    figures = sorted(png.iterdir())
    drawn = ["ablation", "emergence", "latent-paths", "latents", "loss-by-position", "patterns", "scores"]
    assert [f.stem for f in figures] == drawn
    assert [p["score"] for p in found["patterns"]] == ["previous token", "duplicate token", "induction", "first token"]
    for pattern in found["patterns"]:
        assert torch.tensor(pattern["weights"]).sum(1) == pytest.approx(torch.ones(24), abs=0.02)
    assert all(f.read_bytes().startswith(b"\x89PNG") for f in figures)
    assert (
        cli.main(["heads", "quick", "--untrained", "--no-ablation", "--sequences", "2", "--segments", "8", "--json"])
        == 0
    )
    assert json.loads(capsys.readouterr().out)["untrained"] is True


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["quick"], "add --untrained"),
        (["quick", "--untrained", "--emergence"], "no checkpoints"),
        (["no-such-run"], "no-such-run"),
        (["quick", "--untrained", "--segments", "many"], "whole numbers"),
        (["quick", "--untrained", "--out", "nowhere/at/all.json"], "does not exist"),
    ],
)
def test_the_command_refuses_in_one_sentence(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert cli.main(["heads", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_one_checkpoint_is_no_curve(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "copy")
    for step in (2, 4):
        shutil.rmtree(tmp_path / "copy" / f"step-{step:08d}")
    with pytest.raises(UserError, match=r"1 checkpoint, and a curve needs at least 2: train with --train.keep 0"):
        scores_over_training(tmp_path / "copy")


def test_heads_of_a_signed_mechanism_are_scored_said_and_coloured_as_such(tmp_path):
    """Shares are of the sum of sizes; scores below 0 are there, and nothing is lost in a logarithm."""
    from attnlab.formatting import about_signs
    from attnlab.heads import png, watch, whole
    from attnlab.terminal import tables

    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=40,
        context=16,
        n_layers=2,
        d_model=16,
        n_heads=2,
        mechanisms=("mha", "gated_delta"),
        positions="rope",
    )
    model = Decoder(config).eval()
    with watch(model) as layers, torch.no_grad():
        model(torch.randint(40, (2, 16)))
    softmax, signed = (layer.shares() for layer in layers)
    assert float(softmax.min()) >= 0 and float(signed.min()) < 0
    torch.testing.assert_close(signed.abs().sum(-1), torch.ones(2, 2, 16))
    found = whole(model, sequences=2, segments=[4, 8], causal=False) | {"source": "x", "untrained": False}
    assert found["signed"] == ["gated_delta"]
    values = [v for score in found["scores"]["scores"].values() for layer in score for v in layer]
    assert all(math.isfinite(v) for v in values) and min(values) < 0
    console = tables.console()
    with console.capture() as said:
        console.print(tables.heads(found))
    assert "gated_delta: weights may be negative" in " ".join(said.get().split())
    assert about_signs(["gated_delta"]).startswith("gated_delta: weights may be negative")
    assert {"scores.png", "patterns.png"} <= {path.name for path in png.write_pngs(found, tmp_path)}
