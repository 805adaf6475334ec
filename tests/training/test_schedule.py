"""The learning rate by step, what is refused or said of it, and runs that go on for more steps than they began with."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from helpers import PANGRAM, tiny_corpus, tiny_model, tiny_training

from attnlab.cli.main import main
from attnlab.comparison.compare import foresee
from attnlab.comparison.engines import Local
from attnlab.comparison.grid import Comparison
from attnlab.config import DataConfig, RunConfig, TrainConfig
from attnlab.errors import UserError
from attnlab.runs.folder import RunFolder
from attnlab.training.schedule import cautions, check_rates, learning_rate
from attnlab.training.train import train


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    return tiny_corpus(tmp_path_factory.mktemp("text"), 12 * PANGRAM).source


@pytest.fixture
def config(text) -> RunConfig:
    rhythm = {"steps": 11, "log_every": 4, "eval_every": 3, "save_every": 5, "schedule": "wsd", "decay": 0.2}
    return RunConfig(
        name="tiny", model=tiny_model(dropout=0.1), data=DataConfig(source=text), train=tiny_training(**rhythm), seed=3
    )


def with_train(config: RunConfig, **fields) -> RunConfig:
    return replace(config, train=replace(config.train, **fields))


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize("steps, warmup, decay", [(100, 10, 0.2), (37, 30, 0.9), (5, 5, 0.5), (40, 0, 1.0)])
def test_the_rate_rises_once_and_then_falls_without_a_jump(schedule, steps, warmup, decay):
    config = TrainConfig(steps=steps, warmup=warmup, lr=0.5, min_lr=0.01, decay=decay, schedule=schedule)
    rates = [learning_rate(config, step) for step in range(steps)]
    assert all(a < b for a, b in pairwise(rates[:warmup])) and all(a >= b for a, b in pairwise(rates[warmup:]))
    assert max(rates) <= 0.5 and rates[warmup : warmup + 1] in ([], [0.5])
    if schedule == "constant":
        assert set(rates[warmup:]) <= {0.5}


@pytest.mark.parametrize(
    "lr, min_lr", [(5e-5, 4e-4), (1e-4, 1.1e-4), (1e-3, -1e-5), (float("nan"), 0.0), (1e-3, float("nan")), (1e400, 0.0)]
)
def test_rates_that_cannot_be(lr, min_lr):
    with pytest.raises(UserError, match=r"train\.(min_)?lr"):
        check_rates(TrainConfig(lr=lr, min_lr=min_lr))


def test_a_floor_above_the_rate_is_refused_everywhere(config, tmp_path, text, capsys):
    wrong = with_train(config, lr=7e-5, min_lr=3e-4)
    for schedule in ("cosine", "wsd", "constant"):
        with pytest.raises(UserError, match=r"train\.min_lr 0\.0003 is above train\.lr 7e-05, from .*--train\.min-lr"):
            train(with_train(wrong, schedule=schedule), tmp_path / "run")
    with pytest.raises(UserError, match=r"min_lr 0\.0003"):
        foresee(Comparison(preset=wrong, mechanisms=["mha"], seeds=1), tmp_path / "sweep", Local())
    assert not list(tmp_path.iterdir())
    words = ["train", "quick", "--data", text, "--train.lr", "6e-5", "--model.context", "16"]
    assert main([*words, "--out", str(tmp_path / "run")]) == 2
    assert main([*words, "--dry-run", "--flops", "1e12"]) == 0
    assert "Training would stop here: train.min_lr 0.0004" in capsys.readouterr().out
    equal = with_train(config, lr=7e-5, min_lr=7e-5, steps=2)
    assert train(equal, tmp_path / "equal").status == "done"


def test_a_schedule_without_room_is_told(config, tmp_path, text, capsys):
    assert cautions(TrainConfig()) == cautions(TrainConfig(schedule="wsd", warmup=1600)) == []
    (said,) = cautions(TrainConfig(steps=30, warmup=70, lr=0.71))
    assert said.startswith("the warm-up of 70 steps (train.warmup) is longer than the run of 30:")
    assert "ends at 0.3 and never reaches train.lr 0.71" in said
    (said,) = cautions(TrainConfig(steps=50, warmup=40, decay=0.5, schedule="wsd"))
    assert said.startswith(
        "the decay of 25 steps (train.decay 0.5 of 50) is longer than the 10 that the warm-up leaves"
    )
    tiny = "--model.context 16 --model.n-layers 1 --model.d-model 16 --model.n-heads 2 --train.steps 3 --train.warmup 9"
    few = [*tiny.split(), "--train.eval-batches", "1", "--data", text]
    assert main(["train", "quick", *few, "--out", str(tmp_path / "run")]) == 0
    assert main(["train", "quick", *few, "--dry-run", "--flops", "1e12"]) == 0
    assert main(["compare", "quick", *few, "--mechanisms", "mha", "--seeds", "1", "--dry-run"]) == 0
    told = capsys.readouterr()
    assert (told.out + told.err).replace("\n", " ").count("warm-up of 9 steps") == 3


def same_run(one: RunFolder, other: RunFolder) -> None:
    first, second = one.load(), other.load()
    assert first.step == second.step
    for a, b in ((first.model, second.model), (first.optimizer, second.optimizer)):
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    for curve in ("curve", "train_curve", "tokens", "steps", "key", "val_loss", "train_loss"):
        assert getattr(one.result(), curve) == getattr(other.result(), curve), curve
    assert one.config == other.config and json.loads((one.path / "run.json").read_text())["key"] == one.config.key


@pytest.mark.parametrize(
    "fields, first, then",
    [
        ({"schedule": "constant"}, 11, 23),
        ({"schedule": "constant", "guard": "skip", "accumulate": 2, "log_every": 1}, 7, 13),
        ({"schedule": "cosine", "lr": 2e-3, "min_lr": 2e-3}, 5, 14),
        ({"schedule": "cosine", "warmup": 9}, 8, 12),
        ({"schedule": "wsd", "decay": 0.01}, 11, 24),
    ],
)
def test_more_steps_give_the_run_that_was_begun_with_them(config, tmp_path, fields, first, then):
    config = with_train(config, **fields)
    assert train(with_train(config, steps=first), tmp_path / "longer").steps == first
    result = train(with_train(config, steps=then), tmp_path / "longer", resume=True)
    assert result.status == "done" and result.steps == then
    train(with_train(config, steps=then), tmp_path / "whole")
    same_run(RunFolder.open(tmp_path / "longer"), RunFolder.open(tmp_path / "whole"))
    again = train(with_train(config, steps=then), tmp_path / "longer", resume=True)
    assert again.seconds == result.seconds  # it is done


@pytest.mark.parametrize("then", [14, 30])
def test_a_run_that_was_stopped_before_its_decay_goes_on_to_another_end(config, tmp_path, then):
    config = with_train(config, steps=20, decay=0.3)  # it decays from step 14 on

    def stop(event):
        if event["step"] == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "run", progress=stop)  # the checkpoint of step 5 is there
    assert RunFolder.open(tmp_path / "run").newest() == 5
    train(with_train(config, steps=then), tmp_path / "run", resume=True)
    train(with_train(config, steps=then), tmp_path / "whole")
    same_run(RunFolder.open(tmp_path / "run"), RunFolder.open(tmp_path / "whole"))


@pytest.mark.parametrize(
    "fields, then, said",
    [
        ({"schedule": "cosine"}, 20, r"rate \(schedule cosine\) would have been another from step 3 on.*--init "),
        ({"schedule": "wsd", "decay": 0.4}, 20, r"\(schedule wsd\).* from step 7 on, of which 11 are done.*constant"),
        ({"schedule": "constant"}, 10, r"is at step 11 already, and train.steps is 10: give 11 or more"),
        ({"schedule": "constant", "weight_decay": 0.3}, 20, r"another run \(train.steps 11 there, 20 given"),
    ],
)
def test_more_steps_are_refused_where_they_would_give_another_run(config, tmp_path, fields, then, said):
    other = fields.pop("weight_decay", 0.1)
    config = with_train(config, **fields)
    train(config, tmp_path / "run")
    files = {file: file.read_bytes() for file in (tmp_path / "run").glob("*.json*")}
    with pytest.raises(UserError, match=said):
        train(with_train(config, steps=then, weight_decay=other), tmp_path / "run", resume=True)
    assert {file: file.read_bytes() for file in (tmp_path / "run").glob("*.json*")} == files


def test_more_steps_need_the_same_text(config, tmp_path):
    config = with_train(replace(config, data=tiny_corpus(tmp_path)), schedule="constant", steps=3)
    train(config, tmp_path / "run")
    tiny_corpus(tmp_path, 13 * PANGRAM)
    with pytest.raises(UserError, match="is not what"):
        train(with_train(config, steps=5), tmp_path / "run", resume=True)
    assert RunFolder.open(tmp_path / "run").config.train.steps == 3 and RunFolder.open(tmp_path / "run").result()


def test_another_order_of_the_data_is_not_gone_on_with(config, tmp_path):
    config = with_train(config, steps=3)
    train(config, tmp_path / "run")
    path = tmp_path / "run" / "run.json"
    about = json.loads(path.read_text())
    assert about["data"].pop("order") == 2
    path.write_text(json.dumps(about))
    with pytest.raises(UserError, match="reads text in another order"):
        train(config, tmp_path / "run", resume=True)


def test_a_comparison_does_not_pair_two_orders_of_the_data(config, tmp_path):
    comparison = Comparison(preset=with_train(config, steps=2), mechanisms=["mha"], seeds=2)
    assert "2 of 2 runs" in foresee(comparison, tmp_path, Local())
    from attnlab.comparison.grid import sweep

    cell = sweep(comparison, tmp_path).cells[0]
    train(cell.config, cell.folder)
    assert "1 of 2 runs" in foresee(comparison, tmp_path, Local())
    path = cell.folder / "run.json"
    about = json.loads(path.read_text())
    path.write_text(json.dumps(about | {"data": {**about["data"], "order": 1}}))
    with pytest.raises(UserError, match="reads text in another order"):
        foresee(comparison, tmp_path, Local())
