"""Every recipe runs, small; a dry run says what the whole one would take."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from attnlab import Decoder, UserError, load_model, presets, pretrained
from attnlab.cli import main as cli
from attnlab.config import ModelConfig, RunConfig, TrainConfig, from_dict, to_dict
from attnlab.convert import convert
from attnlab.costs.dry_run import FLOAT, forecast
from attnlab.data import ByteTokenizer
from attnlab.data.prepare import Recipe, prepare
from attnlab.evaluation.perplexity import evaluate_source
from attnlab.formatting import span
from attnlab.measure.counters import counted_flops, matrix_rate
from attnlab.model import parameters
from attnlab.training.train import learning_rate, train

RECIPES = [name for name in presets.names() if presets.get(name).data.source.startswith("prepared:")]


def test_the_recipes_are_there_by_name() -> None:
    assert RECIPES == [
        "tinystories-gpt2-msla",
        "openwebtext-124m",
        "openwebtext-124m-mla384",
        *(f"wikitext103-35m-{name}" for name in ("mha", "mqa", "mla")),
        *(f"wikitext2-gpt2-{name}" for name in ("mha", "mqa", "gqa", "mla", "mka", "fast_mka")),
    ]
    for name in presets.names():
        config = presets.get(name)
        assert config.name == name
        assert from_dict(RunConfig, json.loads(json.dumps(to_dict(config)))) == config
        assert len(presets.about(name)) > 40


def test_what_was_published_about_them_is_what_they_are() -> None:
    def without_positions(name: str) -> int:
        model = presets.get(name).model
        return parameters(model) - model.context * model.d_model * (model.positions == "learned")

    assert without_positions("openwebtext-124m") == 123_587_328
    assert without_positions("openwebtext-124m-mla384") == 120_012_288 + (50304 - 50257) * 768
    for name in ("openwebtext-124m", "openwebtext-124m-mla384"):
        config = presets.get(name)
        assert forecast(config, 1.0).tokens_per_step == 491_520
        assert config.train.steps == 27_000
    assert parameters(presets.get("wikitext103-35m-mha").model) == pytest.approx(35e6, rel=0.02)
    with torch.device("meta"):
        attention = Decoder(presets.get("wikitext103-35m-mla").model).blocks()[0].attention
    assert attention.config.cache_spec.floats(1) == 341 + 16
    assert (attention.q_down.out_features, attention.o.in_features) == (256, 16 * 32)
    assert isinstance(attention.norm, torch.nn.LayerNorm) and isinstance(attention.q_norm, torch.nn.LayerNorm)
    assert presets.get("tinystories-gpt2-msla").train.steps == 1000


def test_members_of_a_family_differ_in_their_attention_alone() -> None:
    for family in ("wikitext103-35m-", "wikitext2-gpt2-", "openwebtext-124m"):
        members = [presets.get(name) for name in RECIPES if name.startswith(family)]
        plain = [replace(each, name="", model=replace(each.model, mechanisms=("mha",), options={})) for each in members]
        assert len(members) > 1 and all(each == plain[0] for each in plain)


@pytest.mark.parametrize("name", RECIPES)
def test_the_warm_up_is_real_and_the_rate_falls(name: str) -> None:
    config = presets.get(name).train
    rates = [learning_rate(config, step) for step in (0, config.warmup // 2, config.warmup, config.steps - 1)]
    assert rates[0] < rates[1] < rates[2] == config.lr > rates[3]
    assert rates[3] == pytest.approx(config.min_lr, rel=0.01)


def test_the_story_recipe_begins_with_pretrained_weights(corpus: Path, tmp_path: Path) -> None:
    """GPT-2's own layers, as msla: a stand-in of its form, converted, then trained as the preset says."""
    config = small("tinystories-gpt2-msla", corpus)
    fields = config.model.options["msla"]
    torch.manual_seed(1)
    trained = Decoder(replace(config.model, mechanisms=("mha",), options={})).eval()
    text = [torch.randint(256, (4, 32)) for _ in range(2)]
    sparse = {"top_k": fields["top_k"], "local": fields["local"]}
    made, _ = convert(trained, "msla", rank=fields["kv_rank"], calibration=text, options=sparse)
    folder = pretrained.save(pretrained.Loaded(made, ByteTokenizer(), "stand-in", "attnlab"), tmp_path / "made")
    still = replace(config.train, lr=1e-12, min_lr=1e-12, weight_decay=0.0, train="attention")
    train(replace(config, train=still, init=str(folder)), tmp_path / "run")
    begun, _ = load_model(tmp_path / "run")
    for name, weight in made.state_dict().items():
        if not name.endswith(".calls"):  # in training
            assert torch.allclose(begun.state_dict()[name], weight, atol=1e-9), name


SMALL = RunConfig(
    model=ModelConfig(vocab_size=1000, context=32, n_layers=2, d_model=64, n_heads=4),
    train=TrainConfig(steps=30, batch_size=3, accumulate=2),
)


def test_a_forecast_counts() -> None:
    found = forecast(SMALL, 1e9)
    assert found.parameters == Decoder(SMALL.model).parameter_count()
    assert found.tokens_per_step == 3 * 2 * 32 and found.tokens == 30 * 3 * 2 * 32
    assert found.flops == pytest.approx(found.flops_per_token * found.tokens)
    assert found.seconds == pytest.approx(found.flops / 1e9)
    assert found.cache_bytes_per_token == FLOAT * 2 * 2 * 64
    assert found.cache_bytes == 32 * found.cache_bytes_per_token
    assert not found.measured and forecast(SMALL).measured


def test_training_flops_are_three_forward_passes_as_counted() -> None:
    model = Decoder(replace(SMALL.model, impl="reference"))
    tokens = torch.randint(1000, (1, 32))
    counted = counted_flops(lambda: model.loss(tokens, tokens).backward())
    assert forecast(SMALL, 1.0).flops_per_token * 32 == pytest.approx(counted, rel=0.01)


def test_the_rate_is_that_of_a_matrix_product() -> None:
    rate = matrix_rate(torch.device("cpu"), torch.float32, seconds=0.05)
    assert 1e8 < rate < 1e14


def test_times_are_said_in_the_unit_that_fits() -> None:
    assert [span(s) for s in (0.2, 59, 61, 7200, 86400 * 2, 4e8)] == [
        "0.2 seconds", "59.0 seconds", "1.0 minutes", "2.0 hours", "2.0 days", "12.7 years",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small stand-in for every corpus: forty stories, prepared."""
    place = tmp_path_factory.mktemp("corpus")
    stories = [f"Once upon a time, {n} mice met a cat. The cat had {n * n % 17} friends.\n\n" for n in range(40)]
    (place / "stories.txt").write_text("".join(stories))
    prepare(
        Recipe(source=f"text:{place}/stories.txt", tokenizer="byte", documents="blank"), place / "prepared", workers=1
    )
    return place / "prepared"


def small(name: str, corpus: Path) -> RunConfig:
    """The preset with little of everything: the same mechanism, form of options, schedule and kind of corpus."""
    config = presets.get(name)
    options = {
        mechanism: {key: min(value, 16) if isinstance(value, int) else value for key, value in fields.items()}
        for mechanism, fields in config.model.options.items()
    }
    shape = {"vocab_size": 257, "context": 32, "n_layers": 2, "d_model": 32, "n_heads": 4}
    train = {"steps": 6, "batch_size": 2, "warmup": 2, "eval_every": 3, "eval_batches": 2, "save_every": 6}
    return replace(
        config,
        model=replace(config.model, options=options, **shape),
        train=replace(config.train, accumulate=min(config.train.accumulate, 2), device="cpu", **train),
        data=replace(config.data, source=f"prepared:{corpus}"),
    )


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_runs_end_to_end(name: str, corpus: Path, tmp_path: Path) -> None:
    config = small(name, corpus)
    result = train(config, tmp_path / "run")
    assert (result.status, result.steps) == ("done", 6)
    assert result.val_loss is not None and result.val_loss < 7
    found = evaluate_source(tmp_path / "run", device="cpu")
    assert (found.split, found.documents) == ("val", 4)
    assert found.perplexity == pytest.approx(math.exp(found.loss)) and 0 < found.stderr < found.loss
    assert result.parameters == forecast(config, 1.0).parameters


Said = Callable[..., tuple[int, str, str]]


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Said:
    monkeypatch.chdir(tmp_path)

    def said(*words: str) -> tuple[int, str, str]:
        code = cli.main(words)
        return code, *capsys.readouterr()

    return said


def test_a_dry_run_says_what_a_run_would_take(said: Said, tmp_path: Path) -> None:
    code, out, _ = said("train", "openwebtext-124m-mla384", "--dry-run", "--flops", "100e12")
    assert code == 0
    for fact in ("120,834,816", "13,271,040,000", "27,000 steps of 491,520", "18,432 bytes per token", "18.0 MiB"):
        assert fact in out
    assert "1.3 days at 100,000 GFLOP/s (as given)" in out
    assert "Mended" in out
    assert "Training would stop here: data/openwebtext is not there; make it with attnlab prepare openwebtext" in out
    code, out, _ = said("train", "quick", "--mechanism", "mla", "--dry-run")
    assert code == 0 and "a matrix product here" in out and "would stop" not in out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", RECIPES)
def test_the_commands_that_make_a_missing_corpus_are_said_and_would_be_taken(
    name: str, said: Said, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, _, error = said("train", name)
    assert code == 2 and not list(tmp_path.iterdir())
    source = presets.get(name).data.source.removeprefix("prepared:")
    commands = error.strip().removeprefix(f"attnlab: {source} is not there; make it with ").split(" and then ")
    assert f"--out {source}" in commands[-1]
    for command in commands:
        program, verb, *words = command.split()
        cli.parsed(verb, words)  # its options exist; nothing is fetched
        assert (program, capsys.readouterr().err) == ("attnlab", "")


def test_compare_says_them_too(said: Said) -> None:
    code, _, error = said("compare", "wikitext2-gpt2-mka", "--mechanisms", "mha,mka")
    assert code == 2 and "data/wikitext-2 is not there; make it with attnlab prepare wikitext-2" in error


def test_a_dry_run_knows_the_text_that_is_there(said: Said, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("".join(map(chr, range(0x4E00, 0x4E00 + 300))) * 5)
    code, out, _ = said("train", "quick", "--data", "text:text.txt", "--dry-run", "--flops", "1e9")
    grown = replace(presets.get("quick").model, vocab_size=300)
    assert code == 0 and f"{parameters(grown):,}" in out


def test_a_rate_that_is_none_is_refused(said: Said) -> None:
    assert "--flops is 0.0" in said("train", "quick", "--dry-run", "--flops", "0")[2]
    assert "for --dry-run alone" in said("train", "quick", "--flops", "1e9")[2]
    with pytest.raises(UserError, match="n_heads"):
        forecast(replace(SMALL, model=replace(SMALL.model, mechanisms=("gqa",), options={"gqa": {"n_kv_heads": 3}})))
