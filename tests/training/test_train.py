from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from helpers import PANGRAM, tiny_corpus, tiny_model, tiny_training
from torch import nn

from attnlab import attention, data
from attnlab.config import DataConfig, Execution, RunConfig, TrainConfig, to_dict
from attnlab.device import find_device, find_precision
from attnlab.errors import UserError
from attnlab.inference.generate import Sampling
from attnlab.inference.text import sample_run
from attnlab.recording import record_attention
from attnlab.runs import folder as run_folder
from attnlab.runs.folder import RunFolder
from attnlab.runs.processes import Processes
from attnlab.runs.tensors import optimizer_tensors
from attnlab.training.gradient_scale import Scale
from attnlab.training.optimizers import make_optimizers
from attnlab.training.schedule import learning_rate
from attnlab.training.step import Trainer, seed_dropout, train_step
from attnlab.training.train import Diverged, resolve, train
from attnlab.training.validation import validate

TEXT = 12 * PANGRAM
MODEL = tiny_model(context=32)
TRAIN = tiny_training(log_every=3, eval_every=4, save_every=5)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    return tiny_corpus(tmp_path_factory.mktemp("text"), TEXT).source


@pytest.fixture
def config(text) -> RunConfig:
    return RunConfig(name="tiny", model=MODEL, data=DataConfig(source=text), train=TRAIN, seed=3)


def with_model(config: RunConfig, **fields) -> RunConfig:
    return replace(config, model=replace(config.model, **fields))


def with_train(config: RunConfig, **fields) -> RunConfig:
    return replace(config, train=replace(config.train, **fields))


def interrupt_at(step: int):
    """A listener through which the process gets a real signal once `step` is reported."""

    def listen(event: dict) -> None:
        if event["step"] == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return listen


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


CASES = [
    *[pytest.param({"mechanisms": (name,)}, {}, id=name) for name in attention.names()],
    pytest.param({"dropout": 0.3}, {}, id="dropout"),
    pytest.param({"dropout": 0.3, "ff": "moe", "balance": "bias"}, {"optimizer": "muon"}, id="muon"),
    pytest.param({"dropout": 0.3, "tied": False}, {"precision": "bf16", "accumulate": 2}, id="bf16"),
]


@pytest.mark.parametrize(("model", "training"), CASES)
def test_resumed_equals_uninterrupted(config, tmp_path, model, training):
    config = with_train(with_model(config, **{"dropout": 0.1, **model}), **{"log_every": 7, **training})
    whole = train(config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt, match="after step 7"):
        train(config, tmp_path / "parts", progress=interrupt_at(7))
    parts = RunFolder.open(tmp_path / "parts")
    assert parts.newest() == 7 and parts.result().status == "interrupted"
    result = train(config, tmp_path / "parts", resume=True)

    one, other = RunFolder.open(tmp_path / "whole").load(), parts.load()
    assert one.step == other.step == 12
    assert same(one.model, other.model) and one.optimizer and same(one.optimizer, other.optimizer)
    assert result.status == "done" and result.curve == whole.curve and result.train_curve == whole.train_curve


def test_killed_without_warning(config, tmp_path):
    """SIGKILL after the checkpoint of step 5: what came after it is done again, to the same end."""
    script = (
        "import json, os, signal, sys\n"
        "from attnlab.config import RunConfig, from_dict\n"
        "from attnlab.training.train import train\n"
        "stop = lambda event: event['step'] == 8 and os.kill(os.getpid(), signal.SIGKILL)\n"
        "train(from_dict(RunConfig, json.loads(sys.argv[1])), sys.argv[2], progress=stop)\n"
    )
    out = tmp_path / "killed"
    done = subprocess.run([sys.executable, "-c", script, json.dumps(to_dict(config)), str(out)], timeout=600)
    folder = RunFolder.open(out)
    assert done.returncode == -signal.SIGKILL and folder.newest() == 5 and folder.metrics()[-1]["step"] == 8
    whole, again = train(config, tmp_path / "whole"), train(config, out, resume=True)
    assert (again.curve, again.train_curve) == (whole.curve, whole.train_curve)
    assert same(folder.load().model, RunFolder.open(tmp_path / "whole").load().model)
    steps = [record["step"] for record in folder.metrics()]
    assert steps == sorted(steps)


def test_a_run_tells_everything(config, tmp_path):
    events: list[dict] = []
    config = with_model(config, mechanisms=("sliding", "mla"), options={"mla": {"kv_rank": 12}})
    result = train(config, tmp_path, progress=events.append)
    folder = RunFolder.open(tmp_path)
    assert folder.result() == result and folder.steps() == [10, 12]
    assert result.key == folder.config.key == resolve(config)[0].key
    assert (result.status, result.mechanism, result.seed) == ("done", "sliding+mla", 3)
    assert result.options == {"mla": {"kv_rank": 12}}
    assert (result.steps, result.tokens, result.context) == (12, 12 * 2 * 32, 32)
    assert [step for step, _ in result.train_curve] == [3, 6, 9, 12] == [e["step"] for e in events if "loss" in e]
    assert [step for step, _ in result.curve] == [4, 8, 12] == [e["step"] for e in events if "val_loss" in e]
    assert result.val_loss == result.curve[-1][1] and result.best_val_loss == min(loss for _, loss in result.curve)
    assert result.train_loss == result.train_curve[-1][1] < result.train_curve[0][1]

    model, _ = run_folder.load_model(tmp_path)
    specs = [layer.attention.config.cache_spec for layer in model.layers]
    assert result.parameters == sum(p.numel() for p in model.parameters())
    assert result.floats_per_token == specs[1].per_token == 12 + 4  # the ring costs nothing more
    assert result.cache_bytes == 4 * (specs[0].floats(32) + specs[1].floats(32))
    assert result.flops_per_token > 0 and result.peak_bytes > 2**20 and result.threads == torch.get_num_threads()
    assert result.precision == "fp32" and result.device == "cpu" and result.impl == "sdpa"
    logged = [record for record in folder.metrics() if "loss" in record]
    assert [record.get("warm_up") for record in logged] == [True, None, None, None]
    assert result.tokens_per_s == sorted(record["tokens_per_s"] for record in logged[1:])[1]
    assert [record["lr"] for record in logged] == [learning_rate(config.train, step) for step in (2, 5, 8, 11)]
    assert all(record["grad_norm"] > 0 for record in logged)


def test_what_it_achieved_is_told(config, tmp_path):
    """Rates, a share of a peak that says where it is from, and no more time waiting for data than there was."""
    result = train(config, tmp_path, how=Execution(peak=1e12))
    logged = [record for record in RunFolder.open(tmp_path).metrics() if "loss" in record]
    per_token = 3 * result.flops_per_token
    for record in logged:
        assert record["flops_per_s"] == pytest.approx(record["tokens_per_s"] * per_token)
        assert record["mfu"] == pytest.approx(record["flops_per_s"] / 1e12)
        assert 0 <= record["data_wait"] <= 1 and record["memory"] > 2**20
    assert result.peak == "1 TFLOP/s (given by --peak)" and result.strategy == "single" and result.processes == 1
    assert result.mfu == sorted(record["mfu"] for record in logged[1:])[1]
    assert (tmp_path / "heartbeat" / "rank-00000.json").exists()


def test_trackers_go_on_in_the_same_run(config, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    how = Execution(track=("tensorboard",))
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path, progress=interrupt_at(6), how=how)
    train(config, tmp_path, resume=True, how=how)
    seen = EventAccumulator(str(tmp_path / "track" / "tensorboard")).Reload()
    found = {name: [(e.step, e.value) for e in seen.Scalars(name)] for name in ("train/loss", "val/loss")}
    for name, curve in (("train/loss", "train_curve"), ("val/loss", "curve")):
        wanted = getattr(RunFolder.open(tmp_path).result(), curve)
        assert [step for step, _ in found[name]] == [step for step, _ in wanted]
        assert [value for _, value in found[name]] == pytest.approx([value for _, value in wanted])
    with pytest.raises(UserError, match=r"unknown tracker 'wandbb'.*did you mean 'wandb'"):
        train(config, tmp_path / "other", how=Execution(track=("wandbb",)))
    assert not (tmp_path / "other").exists()


def test_deterministic_kernels_are_asked_for_and_given_back(config, tmp_path):
    seen = []
    plain = train(config, tmp_path / "plain")
    tell = lambda event: seen.append(torch.are_deterministic_algorithms_enabled())  # noqa: E731
    sure = train(with_train(config, deterministic=True), tmp_path / "sure", progress=tell)
    assert all(seen) and not torch.are_deterministic_algorithms_enabled()
    assert sure.curve == plain.curve  # on a CPU they are the same ones


def test_auxiliary_losses_are_logged_and_learnt(config, tmp_path):
    config = with_model(config, mechanisms=("msla",), ff="moe")
    train(config, tmp_path)
    logged = [record for record in RunFolder.open(tmp_path).metrics() if "loss" in record]
    assert all(record["indexer"] > 0 and record["balance"] > 0.9 for record in logged)


def test_the_same_seed_means_the_same_batches_for_every_mechanism(config):
    seen = []
    for name in attention.names():
        resolved, corpus = resolve(with_model(config, mechanisms=(name,)))
        seen.append([x for step in (0, 11) for x, *_ in Trainer.of(resolved, corpus).batch(step)])
    assert all(torch.equal(a, b) for parts in seen[1:] for a, b in zip(parts, seen[0], strict=True))


@pytest.mark.parametrize("name", ["msla", "mka"])  # one with a loss of its own beside the model's, one without
def test_two_half_batches_equal_one_batch(config, name):
    whole = with_train(with_model(config, mechanisms=(name,)), batch_size=4)
    halves = with_train(whole, batch_size=2, accumulate=2)
    trained = []
    for each in (whole, halves):
        trainer = Trainer.of(*resolve(each))
        trainer.model.double()
        results = [train_step(trainer, step) for step in range(4)]
        trained.append([*trainer.model.parameters(), *(value.double() for step in results for value in step[:2])])
    for a, b in zip(*trained, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)


def test_training_leaves_the_callers_random_numbers_and_signals_alone(config, tmp_path):
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    train(with_model(config, dropout=0.2), tmp_path)
    assert torch.equal(torch.rand(3), expected)
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def test_results_do_not_depend_on_the_callers_random_state(config, tmp_path):
    one = train(config, tmp_path / "one")
    torch.rand(7)
    assert train(config, tmp_path / "two").curve == one.curve
    assert train(replace(config, seed=4), tmp_path / "three").curve != one.curve


def test_a_second_interrupt_does_not_wait(config, tmp_path):
    def twice(event: dict) -> None:
        if event["step"] == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path, progress=twice)
    assert RunFolder.open(tmp_path).newest() is None
    assert train(config, tmp_path, resume=True).status == "done"  # from the start: nothing had been saved


def test_it_trains_in_a_thread(config, tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(train(config, tmp_path)))
    thread.start()
    thread.join()
    assert results[0].status == "done"


def test_a_finished_run_is_not_done_again(config, tmp_path):
    result = train(config, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert train(config, tmp_path, resume=True) == result
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(UserError, match="--resume"):
        train(config, tmp_path)


@pytest.mark.parametrize("at", [7, 2])
def test_a_loss_that_is_not_finite_stops(config, tmp_path, monkeypatch, at):
    """At step 7 there is a checkpoint of step 5; at step 2 there is none."""
    from attnlab.training import train as module

    honest = module.train_step

    def poisoned(trainer: Trainer, step: int, *rest):
        done = honest(trainer, step, *rest)
        return done._replace(loss=done.loss * math.nan) if step + 1 >= at else done

    monkeypatch.setattr(module, "train_step", poisoned)
    kept = "the checkpoint of step 5 is kept" if at == 7 else "no checkpoint was written yet"
    with pytest.raises(
        Diverged, match=rf"loss became nan at step {at} of 12, and {kept}; .*train\.lr \(it is 0\.001\)"
    ):
        train(with_train(config, log_every=4), tmp_path)
    folder = RunFolder.open(tmp_path)
    result = folder.result()
    assert result.status == "failed" and f"step {at}" in result.error
    assert folder.steps() == ([5] if at == 7 else [])
    monkeypatch.undo()
    if at == 7:
        assert all(tensor.isfinite().all() for tensor in folder.load().model.values())


def test_a_run_whose_first_loss_is_not_finite_leaves_nothing(config, tmp_path, monkeypatch):
    from attnlab.training import train as module

    honest = module.train_step

    def poisoned(trainer: Trainer, step: int, *rest):
        done = honest(trainer, step, *rest)
        return done._replace(loss=done.loss * math.inf)

    monkeypatch.setattr(module, "train_step", poisoned)
    with pytest.raises(Diverged, match="at step 1 of 12"):
        train(config, tmp_path / "made")
    assert not [*tmp_path.iterdir()]
    (tmp_path / "mine").mkdir()
    with pytest.raises(Diverged, match="at step 1 of 12"):
        train(config, tmp_path / "mine")
    assert [*tmp_path.rglob("*")] == [tmp_path / "mine"]


def test_another_number_of_threads_is_said_at_resume(config, tmp_path, monkeypatch):
    said: list[str] = []
    short = with_train(config, steps=6, save_every=3, keep=0)
    train(short, tmp_path / "run")
    (tmp_path / "run/result.json").unlink()
    shutil.rmtree(tmp_path / "run/step-00000006")
    about = json.loads((tmp_path / "run/run.json").read_text())
    assert about["threads"] == torch.get_num_threads()

    def listen(event):
        said.extend([event["say"]] if "say" in event else [])

    (tmp_path / "run/run.json").write_text(json.dumps(about | {"threads": 37}))
    train(short, tmp_path / "run", resume=True, progress=listen)
    assert len(said) == 1 and "37 CPU threads" in said[0] and "OMP_NUM_THREADS=37" in said[0]


def test_a_rate_that_is_too_high_is_found_out(config, tmp_path):
    with pytest.raises(Diverged, match=r"became (nan|inf) at step \d+ of 12"):
        train(with_train(config, lr=1e30, warmup=0, clip=0.0), tmp_path)


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_schedules(schedule):
    config = TrainConfig(steps=100, warmup=10, lr=1.0, min_lr=0.1, decay=0.2, schedule=schedule)
    rates = [learning_rate(config, step) for step in range(101)]
    assert rates[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert rates[10] == 1.0 and rates[100] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(rates[10:]))
    if schedule == "cosine":
        assert rates[55] == pytest.approx(0.55)
    else:
        assert rates[80] == 1.0 and rates[79] == 1.0 and rates[90] == pytest.approx(0.55)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_has_one_optimizer_and_the_right_decay(config, optimizer, tied):
    resolved, corpus = resolve(
        with_train(with_model(config, tied=tied, ff="moe", mechanisms=("mka",)), optimizer=optimizer)
    )
    model = Trainer.of(resolved, corpus).model
    optimizers = make_optimizers(resolved.train, model)
    decays = {
        id(p): (label, group["weight_decay"])
        for label, each in optimizers.items()
        for group in each.param_groups
        for p in group["params"]
    }
    assert len(decays) == len(list(model.parameters()))
    assert sum(len(g["params"]) for each in optimizers.values() for g in each.param_groups) == len(decays)
    for name, parameter in model.named_parameters():
        outer = name in ("embed.weight", "head.weight") or parameter.ndim != 2
        label = "muon" if optimizer == "muon" and not outer else "adamw"
        assert decays[id(parameter)] == (label, 0.1 if parameter.ndim >= 2 else 0.0), name


def test_weights_stay_float32_in_bf16(config):
    trainer = Trainer.of(*resolve(with_train(config, precision="bf16")))
    before = validate(trainer)
    losses = [train_step(trainer, step)[0].item() for step in range(12)]
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert losses[-1] < losses[0] and validate(trainer) < before
    full = Trainer.of(*resolve(config))
    assert losses[0] == pytest.approx(train_step(full, 0)[0].item(), rel=2e-3)


def test_the_scale_of_float16_learns_from_overflows():
    """From 2^16: halved by each step that was not applied, doubled by each 2000 in a row that were."""
    scale = Scale(used=True)
    assert (scale.now, scale.good) == (65536.0, 0)
    for _ in range(1999):
        scale.learn(True)
    assert (scale.now, scale.good) == (65536.0, 1999)
    scale.learn(False)
    assert (scale.now, scale.good) == (32768.0, 0)
    scale.learn(False)
    assert (scale.now, scale.good) == (16384.0, 0)
    seen = []
    for _ in range(4001):
        scale.learn(True)
        seen.append(scale.now)
    assert seen == [16384.0] * 1999 + [32768.0] * 2000 + [65536.0] * 2


def test_only_float16_is_scaled(config):
    for precision in ("fp32", "bf16", "fp16"):
        trainer = Trainer.of(*resolve(with_train(config, precision=precision)))
        assert trainer.scale.used == (precision == "fp16")
        assert trainer.scale.now == (65536.0 if precision == "fp16" else 1.0)
        train_step(trainer, 0)
        assert (trainer.scale.factor, trainer.scale.good) == (65536.0, int(precision == "fp16"))
    assert Scale(used=False, factor=8.0).now == 1.0


@pytest.mark.parametrize("fields", [{}, {"mechanisms": ("msla",), "ff": "moe"}, {"ff": "moe", "balance": "bias"}])
def test_a_scale_changes_nothing_that_a_step_tells_or_does(config, fields):
    """A power of two is lost again to the bit in float32: on the way, it must weigh on every loss, and on no other
    number; auxiliary losses and the share of each part of a batch included."""
    config = with_train(with_model(config, **fields), accumulate=3, clip=0.5)
    trained = []
    for factor in (1.0, 2.0**7, 2.0**-5):
        trainer = Trainer.of(*resolve(config))
        trainer.scale = Scale(used=True, factor=factor)
        before = validate(trainer)
        steps = [train_step(trainer, step) for step in range(3)]
        assert all(step.applied for step in steps) and trainer.scale == Scale(True, factor, 3)
        numbers = [number for step in steps for number in (step.loss.item(), step.norm.item())]
        trained.append(([*numbers, before, validate(trainer)], trainer.model.state_dict()))
    for numbers, weights in trained[1:]:
        assert numbers == trained[0][0] and same(weights, trained[0][1])


@pytest.mark.parametrize("guard", ["stop", "skip"])
def test_a_step_that_overflows_is_left_out_and_halves_the_scale(config, guard):
    """The loss is told as it is; weights, memories of the optimizer and biases of experts stay as they were."""
    trainer = Trainer.of(*resolve(with_train(with_model(config, ff="moe", balance="bias"), guard=guard)))
    train_step(trainer, 0)
    trainer.scale = Scale(used=True, factor=2.0**127, good=7)
    memory = optimizer_tensors(trainer.model, trainer.strategy.optimizers)
    held, memory = ({name: t.clone() for name, t in each.items()} for each in (trainer.model.state_dict(), memory))
    done = train_step(trainer, 1)
    assert not done.applied and not done.norm.isfinite() and 2 < done.loss < 5
    assert trainer.scale == Scale(True, 2.0**126, 0)
    assert same(trainer.model.state_dict(), held)
    assert same(optimizer_tensors(trainer.model, trainer.strategy.optimizers), memory)
    trainer.scale = Scale(used=True, factor=2.0**10)
    done = train_step(trainer, 1)
    assert done.applied and done.norm.isfinite() and trainer.scale == Scale(True, 2.0**10, 1)
    assert not same(trainer.model.state_dict(), held)


def test_a_step_that_is_skipped_for_its_loss_says_nothing_about_the_scale(config):
    trainer = Trainer.of(*resolve(with_train(config, guard="skip")))
    trainer.scale = Scale(used=True, factor=4.0, good=5)
    train_step(trainer, 0)
    assert trainer.scale == Scale(True, 4.0, 6)
    skipped = train_step(trainer, 1, limit=1.0)
    assert not skipped.applied and trainer.scale == Scale(True, 4.0, 6)
    loss = skipped.loss.item()
    for limit, good in ((math.nextafter(loss, 0.0), 6), (loss, 7)):  # what is at the limit is not above it
        assert train_step(trainer, 1, limit=limit).applied == (good == 7)
        assert trainer.scale == Scale(True, 4.0, good)


def test_gradients_are_shared_after_the_last_part_of_a_step_alone(config):
    trainer, seen = Trainer.of(*resolve(with_train(config, accumulate=3))), []
    trainer.strategy.part = lambda last: nullcontext(seen.append(last))
    began = time.perf_counter()
    done = train_step(trainer, 0)
    assert seen == [False, False, True] and done.applied and done.tokens == done.own == 3 * 2 * 32
    assert 0 <= done.waited <= done.working <= time.perf_counter() - began


def test_float16_learns_what_float32_does(config):
    found = {}
    for precision in ("fp32", "fp16"):
        trainer = Trainer.of(*resolve(with_train(config, precision=precision)))
        before = validate(trainer)
        steps = [train_step(trainer, step) for step in range(12)]
        assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
        found[precision] = [before, *(float(n) for step in steps for n in step[:2]), validate(trainer)]
    assert found["fp16"] == pytest.approx(found["fp32"], rel=0.01) and found["fp16"] != found["fp32"]


def test_the_scale_goes_on_where_a_run_was_stopped(config, tmp_path):
    """Nothing overflows here, so what a checkpoint says of the scale is what its good steps are added to."""
    config = with_train(config, precision="fp16")
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path, progress=interrupt_at(6))
    folder = RunFolder.open(tmp_path)
    assert folder.state()["scale"] == [65536.0, 6]
    step, weights, optimizer, state = folder.load()
    model = Trainer.of(*resolve(config), weights=weights).model
    folder.save(step, model, optimizer, {**state, "scale": [512.0, 1996]})
    assert train(config, tmp_path, resume=True).status == "done"
    assert folder.state()["scale"] == [1024.0, 2002]


def test_a_run_goes_on_until_its_scale_is_found(config, tmp_path):
    """What overflows is neither a fault of the run nor counted as one; where no scale helps, it is."""
    config = with_train(config, precision="fp16", log_every=1)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path, progress=interrupt_at(2))
    folder = RunFolder.open(tmp_path)
    step, weights, optimizer, state = folder.load()
    model = Trainer.of(*resolve(config), weights=weights).model
    folder.save(step, model, optimizer, {**state, "scale": [2.0**26, 5]})
    result = train(config, tmp_path, resume=True)
    factor, good = folder.state()["scale"]
    overflowed = 26 - math.log2(factor)
    assert overflowed == 10 - good and 0 < overflowed < 10
    assert result.status == "done" and result.skipped == result.rewinds == 0 and len(result.train_curve) == 12
    assert all(math.isfinite(record["grad_norm"]) for record in folder.metrics() if "loss" in record)


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_a_scale_below_one_means_that_the_gradient_itself_is_not_finite(config, tmp_path, monkeypatch, factor):
    from attnlab.training import train as module

    honest = module.train_step

    def found(trainer: Trainer, step: int, *rest):
        done = honest(trainer, step, *rest)
        if step == 4:  # as after an overflow
            trainer.scale.factor = factor
            done = done._replace(applied=False)
        return done

    monkeypatch.setattr(module, "train_step", found)
    config = with_train(config, precision="fp16")
    if factor == 1.0:
        assert train(config, tmp_path).status == "done"
    else:
        with pytest.raises(Diverged, match="gradient norm became inf at step 5 of 12"):
            train(config, tmp_path)


def test_a_scale_below_one_is_no_fault_of_steps_that_are_applied(config, tmp_path, monkeypatch):
    """One step overflows and brings the scale below 1; those after it are applied, and are not counted as skipped."""
    from attnlab.training import train as module

    honest, seen = module.train_step, []

    def found(trainer: Trainer, step: int, *rest):
        done = honest(trainer, step, *rest)
        if step == 4:
            trainer.scale.factor = 0.5
            done = done._replace(applied=False)
        seen.append(done.applied)
        return done

    monkeypatch.setattr(module, "train_step", found)
    result = train(with_train(config, precision="fp16", guard="skip"), tmp_path)
    assert seen.count(False) == 1 and result.status == "done" and result.skipped == 1
    records = [record for record in RunFolder.open(tmp_path).metrics() if "skipped" in record]
    assert [record["step"] for record in records] == [5] and "gradient norm became inf" in records[0]["skipped"]


def test_validation_is_the_mean_over_fixed_windows(config):
    trainer = Trainer.of(*resolve(config))
    x, y, _ = trainer.corpus.windows(4, 32)
    with torch.no_grad():
        logits, _ = trainer.model(x)
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten()).item()
    assert validate(trainer) == pytest.approx(expected, rel=1e-6) and validate(trainer) == validate(trainer)


class Apart(Processes):
    """One of several processes, which gets nothing from the others."""

    def sum(self, *numbers: float) -> list[float]:
        return list(numbers)


@pytest.mark.parametrize("processes", [2, 3, 5])
def test_processes_share_the_windows_of_a_validation(config, processes):
    """Each batch of three is divided, no row is read twice, and every process reads some of each."""
    trainer = Trainer.of(*resolve(with_train(config, batch_size=3)))
    expected, strategy, shares = validate(trainer), trainer.strategy, []
    for rank in range(processes):
        trainer.processes, rows = Apart(rank=rank, size=processes), []
        trainer.strategy = lambda x, y, documents, plain, rows=rows: rows.append(len(x)) or strategy(x, y, documents)
        trainer.strategy.model = strategy.model
        shares.append(validate(trainer))
        assert len(rows) == 2 and set(rows) <= {1, 2}
    assert sum(shares) == pytest.approx(expected, rel=1e-6) and (0.0 in shares) == (processes > 3)


def test_validation_asks_no_teacher(config):
    trainer = Trainer.of(*resolve(config))
    expected = validate(trainer)
    trainer.strategy.module.objective = lambda *_: pytest.fail("it has a say in training alone")
    assert validate(trainer) == expected and trainer.model.training


def test_what_is_random_in_a_step_depends_on_seed_step_and_process():
    def drawn(*given: int) -> float:
        seed, step, *rank = given
        seed_dropout(seed, step, torch.device("cpu"), *rank)
        return torch.rand(()).item()

    with torch.random.fork_rng([]):
        assert drawn(3, 5) == drawn(3, 5) == drawn(3, 5, 0)
        assert len({drawn(3, 5), drawn(5, 3), drawn(3, 6), drawn(4, 5), drawn(3, 5, 1), drawn(3, 5, 2)}) == 6


INDUCTOR = "ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"  # what importing it says about itself


COMPILE = """
import json, sys
from dataclasses import replace
from attnlab.runs.folder import RunFolder
from attnlab.config import RunConfig, from_dict
from attnlab.training.train import train
config = from_dict(RunConfig, json.loads(sys.argv[1]))
losses = []
for compiled in (False, True):
    out = f"{sys.argv[2]}/{compiled}"
    losses.append(train(replace(config, train=replace(config.train, steps=3, compile=compiled)), out).train_loss)
    losses.append(sorted(RunFolder.open(out).load().model))
print(json.dumps(losses))
"""


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="torch.compile needs a C++ compiler")
def test_a_compiled_model_learns_the_same(config, tmp_path):
    """In a process of its own: the checks of shapes that the tests switch on cannot be compiled."""
    config = with_model(config, n_layers=1)
    command = [sys.executable, "-c", COMPILE, json.dumps(to_dict(config)), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert not done.returncode, done.stderr
    plain, names, compiled, compiled_names = json.loads(done.stdout)
    assert compiled == pytest.approx(plain, rel=1e-4) and compiled_names == names


@pytest.mark.filterwarnings(INDUCTOR)
def test_compiling_without_a_compiler(config, tmp_path, monkeypatch):
    from torch._inductor import cpp_builder, exc

    def none() -> str:
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    with pytest.raises(UserError, match=r"needs a C\+\+ compiler"):
        train(with_train(config, compile=True), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_vocabulary_grows_to_fit_the_text(config):
    resolved, corpus = resolve(with_model(config, vocab_size=3))
    assert resolved.model.vocab_size == corpus.vocab_size == 29
    assert resolve(with_model(config, vocab_size=64))[0].model.vocab_size == 64


def test_bad_input_writes_nothing(config, tmp_path, monkeypatch):
    out = tmp_path / "run"
    cases = [
        (with_model(config, mechanisms=("mhaa",)), "unknown mechanism 'mhaa'"),
        (with_train(config, device="tpu"), "the device 'tpu' is not there: allowed here are auto, cpu"),
        (with_train(config, device="cuda:99"), "the device 'cuda:99' is not there"),
        (with_model(config, context=200), "the validation part of .* has 102 tokens, but one window of context 200"),
        (replace(config, data=DataConfig(source="text:nowhere.txt")), "nowhere.txt does not exist"),
    ]
    with pytest.raises(UserError, match="seed is -1"):
        replace(config, seed=-1)
    for bad, said in cases:
        with pytest.raises(UserError, match=said):
            train(bad, out)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(UserError, match=r"pip install 'attnlab\[train\]'"):
        train(config, out)
    assert not out.exists()


def test_several_processes_need_a_strategy_for_them(config, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="strategy is single, and a launcher started 2 processes: give ddp, fsdp"):
        train(config, tmp_path, how=Execution(strategy="single"))


def test_a_damaged_checkpoint_stops_a_resume(config, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path, progress=interrupt_at(6))
    model = tmp_path / "step-00000006" / "model.safetensors"
    model.write_bytes(model.read_bytes()[:100])
    with pytest.raises(UserError, match=r"model\.safetensors is damaged .*go on from step 5"):
        train(config, tmp_path, resume=True)


def test_precision_and_device_that_are_there():
    assert find_device("cpu") == torch.device("cpu") and find_device("auto").type in ("cpu", "cuda", "mps")
    able = torch.cpu.get_capabilities()
    fast = able.get("avx512_bf16") or able.get("amx_bf16")
    assert find_precision("auto", torch.device("cpu")) == ("bf16" if fast else "fp32")
    assert find_precision("fp32", torch.device("cpu")) == "fp32"


@pytest.mark.parametrize("name", attention.names())
def test_a_trained_run_is_sampled(config, tmp_path, name):
    train(with_train(with_model(config, mechanisms=(name,)), steps=1), tmp_path)
    pieces: dict[int, str] = {0: "", 1: ""}

    def hear(number: int, piece: str) -> None:
        pieces[number] += piece

    out = sample_run(tmp_path, ["the quick ", "pack"], Sampling(9, seed=2), device="cpu", on_text=hear)
    assert out.texts == [pieces[0], pieces[1]] and [len(text) for text in out.texts] == [9, 9]
    assert out.texts[1:] == sample_run(tmp_path, ["pack"], Sampling(9, seed=2), device="cpu").texts
    assert out.tokens == 18 and out.tokens_per_s > 0 and out.step == 1 and out.mechanism == name
    model, _ = run_folder.load_model(tmp_path)
    specs = [layer.attention.config.cache_spec for layer in model.layers]
    assert out.cache_bytes == 4 * sum(spec.floats(length + 8) for spec in specs for length in (10, 4))
    with pytest.raises(UserError, match="'Z'"):
        sample_run(tmp_path, ["Z"], Sampling(9))
    with pytest.raises(UserError, match="prompt 1 is empty"):
        sample_run(tmp_path, [""], Sampling(9))


def test_attention_maps_of_a_trained_run(config, tmp_path):
    train(with_train(config, steps=1), tmp_path)
    model, _ = run_folder.load_model(tmp_path)
    tokens = torch.tensor([data.from_text(TEXT).tokenizer.encode("the quick")])
    with torch.no_grad(), record_attention() as maps:
        model(tokens)
    assert [tuple(m.shape) for m in maps] == [(1, 2, 9, 9)] * 2
