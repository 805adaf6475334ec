"""Healing is training: resumable, of the parameters that were asked for, with or without a teacher."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from dataclasses import replace

import pytest
import torch
from helpers import PANGRAM
from torch.nn import functional as F

from attnlab import pretrained
from attnlab.cli.main import main
from attnlab.config import DataConfig, ModelConfig, RunConfig, TrainConfig, to_dict
from attnlab.convert import convert
from attnlab.data import CharTokenizer
from attnlab.errors import UserError
from attnlab.model import Decoder
from attnlab.runs.folder import RunFolder
from attnlab.training.train import Trainer, resolve, train, train_step, validate

TEXT = 20 * PANGRAM
MODEL = ModelConfig(context=16, n_layers=2, d_model=16, n_heads=2, positions="learned", bias=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A trained model, what it became, and the text."""
    folder = tmp_path_factory.mktemp("heal")
    (folder / "text.txt").write_text(TEXT)
    data = DataConfig(source=f"text:{folder / 'text.txt'}")
    run = TrainConfig(steps=60, batch_size=4, lr=1e-2, warmup=2, eval_every=30, precision="fp32", device="cpu")
    train(RunConfig(model=MODEL, data=data, train=run), folder / "source")
    original = pretrained.load(folder / "source")
    for target, fields in (("mla", {"rank": 4}), ("gqa", {"rank": 1}), ("mka", {})):
        new, _ = convert(original.model, target, **fields)
        pretrained.save(replace(original, model=new), folder / target)
    return folder


def healing(place, target="mla", **fields) -> RunConfig:
    shape = pretrained.load(place / target).model.config
    ours = {name: fields.pop(name) for name in ("teacher", "init") if name in fields}
    run = TrainConfig(
        **{"steps": 8, "batch_size": 4, "warmup": 1, "eval_every": 4, "eval_batches": 2, "save_every": 3, **fields},
        precision="fp32",
        device="cpu",
    )
    data = DataConfig(source=f"text:{place / 'text.txt'}", tokenizer=str(place / target))
    return RunConfig(model=shape, data=data, train=run, **{"init": str(place / target), **ours})


def test_it_starts_from_the_weights_that_it_was_given(place):
    config, corpus = resolve(healing(place))
    trainer = Trainer.of(config, corpus)
    wanted = pretrained.load(place / "mla").model.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in trainer.model.state_dict().items())


def test_the_curve_begins_before_the_first_step(place, tmp_path):
    config = healing(place)
    result = train(config, tmp_path / "run")
    assert [step for step, _ in result.curve] == [0, 4, 8] and result.curve[-1][1] < result.curve[0][1]
    trainer = Trainer.of(*resolve(config))
    assert result.curve[0][1] == validate(trainer)
    tokens = [r["tokens"] for r in RunFolder.open(tmp_path / "run").metrics() if "val_loss" in r]
    assert tokens == [0, 4 * 4 * 16, 8 * 4 * 16]


@pytest.mark.parametrize("fields", [{}, {"train": "attention"}, {"distill": 0.7, "teacher": "source"}])
def test_interrupted_and_resumed_is_as_if_nothing_had_happened(place, tmp_path, fields):
    if "teacher" in fields:
        fields = {**fields, "teacher": str(place / "source")}
    config = healing(place, **fields)
    whole = train(config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(
            replace(config, train=replace(config.train)),
            tmp_path / "parts",
            progress=lambda event: event["step"] == 4 and os.kill(os.getpid(), signal.SIGTERM),
        )
    again = train(config, tmp_path / "parts", resume=True)
    assert again.curve == whole.curve
    one, other = (RunFolder.open(tmp_path / name).load().model for name in ("whole", "parts"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("target", "part", "moves"),
    [
        ("mla", "attention", {"q", "down", "k_up", "v_up", "o"}),
        ("mla", "new", {"q", "down", "k_up", "v_up"}),
        ("mka", "new", {"gate"}),
        ("gqa", "attention", {"qkv", "o"}),
    ],
)
def test_what_is_frozen_stays_and_costs_nothing(place, target, part, moves):
    trainer = Trainer.of(*resolve(healing(place, target, train=part)))
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    for step in range(2):
        train_step(trainer, step)
    changed = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    assert changed and all(".attention." in name for name in changed)
    assert {name.split(".attention.")[1].split(".")[0] for name in changed} == moves
    remembered = {id(value) for optimizer in trainer.strategy.optimizers.values() for value in optimizer.state}
    known = {name for name, value in trainer.model.named_parameters() if id(value) in remembered}
    assert known == {name for name, value in trainer.model.named_parameters() if value.requires_grad} >= changed
    assert all(v.grad is None for v in trainer.model.parameters() if not v.requires_grad)


def test_the_teacher_has_its_share(place):
    """The objective, written out; the validation loss stays the loss."""
    trainer = Trainer.of(*resolve(healing(place, distill=0.25, teacher=str(place / "source"))))
    teacher = pretrained.load(place / "source").model
    part = trainer.batch(0)[0]
    part.y[0, :5] = -1
    counts = part.y >= 0
    with torch.no_grad():
        ours, theirs = (m(part.x)[0][counts].log_softmax(-1) for m in (trainer.model, teacher))
        apart = (theirs.exp() * (theirs - ours)).sum(-1).mean()
        wanted = 0.25 * apart + 0.75 * F.nll_loss(ours, part.y[counts])
        assert float(trainer.strategy(*part)) == pytest.approx(float(wanted), rel=1e-5)
        assert float(trainer.strategy(*part, plain=True)) == pytest.approx(
            float(F.nll_loss(ours, part.y[counts])), rel=1e-5
        )
    assert all(p.grad is None for p in teacher.parameters())


def test_learning_from_the_teacher_alone_brings_them_together(place, tmp_path):
    fields = {"steps": 30, "eval_every": 30, "lr": 3e-3, "distill": 1.0, "teacher": str(place / "source")}
    config = healing(place, **fields)
    x = Trainer.of(*resolve(config)).batch(99)[0].x
    teacher, before = pretrained.load(place / "source").model, pretrained.load(place / "mla").model
    train(config, tmp_path / "run")
    after = pretrained.load(tmp_path / "run").model
    with torch.no_grad():
        wanted = teacher(x)[0].log_softmax(-1)
        apart = [
            float(F.kl_div(m(x)[0].log_softmax(-1), wanted, reduction="sum", log_target=True)) for m in (before, after)
        ]
    assert apart[1] < 0.9 * apart[0]


def test_bad_input_is_said_and_nothing_is_written(place, tmp_path):
    source = str(place / "source")
    with pytest.raises(UserError, match="nothing is new"):
        train(healing(place, "gqa", train="new"), tmp_path / "run")
    with pytest.raises(UserError, match="does not fit the model"):
        train(healing(place, init=source), tmp_path / "run")
    with pytest.raises(UserError, match="give both, or neither"):
        healing(place, distill=0.5)
    with pytest.raises(UserError, match=r"from 0 to 1"):
        healing(place, distill=1.5, teacher=source)
    other = Decoder(replace(MODEL, vocab_size=99)).eval()
    pretrained.save(pretrained.Loaded(other, CharTokenizer.of(TEXT), "other", "attnlab"), tmp_path / "other")
    with pytest.raises(UserError, match="knows 99 tokens"):
        train(healing(place, distill=0.5, teacher=str(tmp_path / "other")), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_command(place, tmp_path, monkeypatch, capsys):
    pytest.importorskip("plotly", reason="plotly is not installed: pip install 'attnlab[report]'")
    monkeypatch.chdir(place)
    text = ["--data", "text:text.txt"]
    assert (
        main(["convert", "source", "--to", "mla", "--rank", "3", *text, "--calibrate", "1", "--out", f"{tmp_path}/new"])
        == 0
    )
    words = [
        "heal",
        f"{tmp_path}/new",
        *text,
        "--steps",
        "6",
        "--distill",
        "0.5",
        "--device",
        "cpu",
        "--precision",
        "fp32",
    ]
    capsys.readouterr()
    assert main([*words, "--out", f"{tmp_path}/run"]) == 0
    shown = capsys.readouterr().out
    found = json.loads((tmp_path / "run" / "recovery.json").read_text())
    assert [tokens for tokens, _ in found["curve"]] == [12 * 16 * step for step in range(7)]
    assert found["curve"][-1][1] < found["curve"][0][1] and f"{found['curve'][0][1]:.4f}" in shown
    assert RunFolder.open(tmp_path / "run").config.teacher == "source"
    page = (tmp_path / "run" / "recovery.html").read_text()
    assert "tokens of healing" in page and "held-out loss (nats per token)" in page
    assert main([*words, "--out", f"{tmp_path}/run", "--resume"]) == 0
    assert main(["heal", "source", *text, "--distill", "1", "--out", "bad"]) == 2
    assert "--teacher" in capsys.readouterr().err and not (place / "bad").exists()


def test_windows_are_capped_and_the_models_context_stays(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    long = replace(MODEL, context=600, vocab_size=65, positions="rope")
    for name, shape in {"long": long, "learned": replace(long, positions="learned")}.items():
        pretrained.save(pretrained.Loaded(Decoder(shape).eval(), None, "here", "attnlab"), name)
        assert main(["heal", name, "--steps", "1", "--batch-size", "1", "--device", "cpu", "--out", f"{name}-run"]) == 0
        config = RunFolder.open(f"{name}-run").config
        assert (config.length, config.model.context) == (512, 600)
        assert RunFolder.open(f"{name}-run").metrics()[-1]["tokens"] == 512
    words = ["heal", "long", "--steps", "1", "--batch-size", "1", "--device", "cpu", "--out", "longer"]
    assert main([*words, "--context", "20"]) == 0 and RunFolder.open("longer").config.length == 20
    with pytest.raises(UserError, match=r"train.context is 601 and model.context 600: give at most that"):
        RunConfig(model=long, train=TrainConfig(context=601))
    known = RunConfig(model=long)
    assert replace(known, train=replace(known.train, context=600)).key != known.key
    fields = to_dict(known)
    del fields["name"], fields["train"]["context"]  # earlier versions had no such field, and their keys stay
    assert hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:12] == known.key
