"""Tasks: an oracle solves them, whoever sees no earlier token cannot, and nothing leaks."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from attnlab import data
from attnlab.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from attnlab.data import tasks
from attnlab.data.endless import STAGES
from attnlab.errors import UserError
from attnlab.evaluation.exam import examine, score
from attnlab.evaluation.perplexity import evaluate_source
from attnlab.model import Decoder
from attnlab.training.train import Trainer, resolve, train, train_step

NAMES = sorted(tasks.TASKS)


def text(name: str, ids: list[int]) -> str:
    return data.CharTokenizer(tasks.task(name).symbols).decode(ids)


# Solvers in plain Python. Each reads the tokens up to the question, and nothing after it.


def follow(seen: str) -> str:
    return seen[seen.index(seen[-1]) + 1]


def copy(seen: str) -> str:
    return seen[len(seen) - 1 - seen.index("|")]


def select(seen: str) -> str:
    return seen.replace(".", "")[seen.count("|") - 1]


ORACLES = {
    "mqar": follow,
    "induction": follow,
    "repeats": follow,
    "copying": copy,
    "selective": select,
    "needle": follow,
}


@pytest.mark.parametrize("name", NAMES)
def test_an_oracle_that_sees_only_earlier_tokens_is_always_right(name: str) -> None:
    task = tasks.task(name)
    for count, length in ((30, task.shortest), (50, 16), (50, 37), (30, 64), (9, 128), (2, task.longest or 700)):
        tokens, targets = task.held_out(count, length)
        assert tokens.shape == targets.shape == (count, length)
        assert len(set((targets >= 0).sum(1).tolist())) == 1, "each sequence of one length asks equally many questions"
        assert (targets >= 0).any() and targets.max() < len(task.symbols)
        for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
            for place, target in enumerate(wanted):
                if target >= 0:
                    assert ORACLES[name](text(name, row[: place + 1])) == text(name, [target])


@pytest.mark.parametrize("name", NAMES)
def test_the_current_token_and_its_place_say_nothing(name: str) -> None:
    """The best table from (place, token) to answer, learnt from many sequences, stays at chance on others."""
    task = tasks.task(name)
    length = 24
    counts: dict[tuple[int, int], Counter[int]] = {}
    for seed in range(10):
        for row, wanted in zip(*(part.tolist() for part in task.sequences(seed, 0, 400, length)), strict=True):
            for place, target in enumerate(wanted):
                if target >= 0:
                    for seen in ((place, row[place]), (-1, row[place]), (place, -1)):
                        counts.setdefault(seen, Counter())[target] += 1
    tokens, targets = task.held_out(1000, length)
    for view in (lambda p, t: (p, t), lambda p, t: (-1, t), lambda p, t: (p, -1)):
        right = [
            counts.get(view(p, row[p]), Counter({0: 1})).most_common(1)[0][0] == target
            for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True)
            for p, target in enumerate(wanted)
            if target >= 0
        ]
        error = 4 * (task.chance / len(right)) ** 0.5
        assert abs(np.mean(right) - task.chance) < error + 0.004


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_spread_evenly(name: str) -> None:
    task = tasks.task(name)
    _, targets = task.sequences(3, 9, 4000, 64)
    counts = np.array(list(Counter(targets[targets >= 0].tolist()).values()))
    assert len(counts) == task.answers + (name in ("induction", "repeats"))  # a symbol is never followed by itself
    assert abs(counts / counts.mean() - 1).max() < 6 / counts.mean() ** 0.5 + 0.02


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_is_a_pure_function_and_a_larger_one_begins_with_it(name: str) -> None:
    corpus = data.load(DataConfig(source=f"task:{name}"))
    late = STAGES[-1][0]
    one, two = corpus.batch(5, late, 6, 64), corpus.batch(5, late, 9, 64)
    assert one.x.shape == (6, 64) and one.x.dtype == torch.int64
    assert torch.equal(one.x, two.x[:6]) and torch.equal(one.y, two.y[:6])
    for other in (corpus.batch(6, late, 6, 64), corpus.batch(5, late + 1, 6, 64), corpus.windows(6, 64)):
        assert not torch.equal(one.x, other.x)
    halves = [corpus.batch(5, late, 6, 64, rank, 2) for rank in (0, 1)]
    assert torch.equal(torch.cat([half.x for half in halves]), one.x)
    assert torch.equal(corpus.windows(4, 64).x, corpus.windows(9, 64).x[:4])


def test_the_stream_never_changes() -> None:
    """Runs of different versions must have seen the same sequences; a change here needs a new name for the task."""
    found = {name: data.load(DataConfig(source=f"task:{name}")).fingerprint[:12] for name in NAMES}
    assert found == {
        "copying": "cb1c40bc108b",
        "induction": "1c3c8a75cc53",
        "mqar": "d40f1bc8e619",
        "needle": "45624576f5c1",
        "repeats": "cdc248dbfce8",
        "selective": "00a54e8bc6a3",
    }


@pytest.mark.parametrize("name", NAMES)
def test_nothing_can_be_learnt_by_heart(name: str) -> None:
    """No held-out sequence, and hardly any of its answers together, was ever trained on."""
    task = tasks.task(name)
    held = {row.tobytes() for row in task.held_out(500, 32)[0]}
    trained = {row.tobytes() for step in range(50) for row in task.sequences(0, step, 64, 32)[0]}
    assert len(held) == 500 and not held & trained


def test_training_begins_with_short_sequences_that_share_a_row() -> None:
    corpus = data.load(DataConfig(source="task:needle"))
    for step, many in ((0, 4), (499, 4), (500, 2), (999, 2), (1000, 1), (10**6, 1)):
        x, y, documents = corpus.batch(0, step, 3, 67)
        assert x.shape == y.shape == (3, 67) and ((y >= 0).sum(1) == many * (67 // many // 4)).all()
        if many == 1:
            assert documents is None
            continue
        assert documents is not None and (documents == documents[0]).all()
        assert documents[0].tolist() == [place // (67 // many) if place < 67 - 67 % many else -1 for place in range(67)]
        own = tasks.task("needle").sequences(0, step, 3 * many, 67 // many)
        assert torch.equal(x[:, : 67 - 67 % many].reshape(3 * many, -1), torch.from_numpy(own[0]))
        assert (y[:, 67 - 67 % many :] == -1).all()


def test_needles_lie_at_every_depth() -> None:
    task = tasks.task("needle")
    tokens, targets = task.held_out(2000, 43)
    assert task.depth is not None
    depth = task.depth(tokens)
    assert depth.shape == targets[targets >= 0].reshape(2000, -1).shape == (2000, 10)
    assert depth.min() == 0 and 0.96 < depth.max() <= 1 and abs(depth.mean() - 0.5) < 0.03
    for row, places in zip(tokens[:50].tolist(), (depth[:50] * 31).round().astype(int).tolist(), strict=True):
        hay, asked = row[:33], row[33:]
        assert [hay[place] for place in places] == asked and all(hay.count(key) == 1 for key in asked)
        assert len(set(asked)) <= 2


def test_marks_noise_and_letters_are_what_they_look_like() -> None:
    shown = {name: text(name, tasks.task(name).held_out(1, 32)[0][0].tolist()) for name in NAMES}
    assert shown["copying"][16] == "|" and shown["copying"][:15] == shown["copying"][17:]
    assert shown["selective"].endswith("||||") and shown["selective"].count(".") == 24
    assert len(set(shown["induction"])) == 16
    assert shown["mqar"][1:8:2].isascii() and not shown["mqar"][::2].isascii()


@pytest.mark.parametrize(
    ("source", "context", "said"),
    [
        ("task:mqa", 64, "unknown task 'mqa': expected one of mqar, .* did you mean 'mqar'"),
        ("task:mqar", 16, "mqar needs at least 8 tokens, and 4 were given"),
        ("task:mqar", 1024, "mqar has symbols for 512 tokens at most, and 1024 were given"),
        ("task:induction", 1024, "induction has symbols for 512 tokens"),
    ],
)
def test_what_cannot_be_asked_is_said(source: str, context: int, said: str) -> None:
    with pytest.raises(UserError, match=said):
        data.load(DataConfig(source=source)).check(context)
    with pytest.raises(UserError, match=r"leave data\.tokenizer and data\.pack out"):
        data.load(DataConfig(source="task:mqar", pack="documents"))


def trained(name: str, mechanism: str, steps: int) -> Decoder:
    """On sequences of 16 tokens, with which training in a context of 64 begins."""
    model = ModelConfig(vocab_size=1, context=64, n_layers=2, d_model=32, n_heads=2, mechanisms=(mechanism,))
    how = TrainConfig(steps=steps, batch_size=8, lr=3e-3, warmup=5, precision="fp32", device="cpu")
    config, corpus = resolve(RunConfig(model=model, data=DataConfig(source=f"task:{name}"), train=how))
    with torch.random.fork_rng([]):
        trainer = Trainer.of(config, corpus)
        for step in range(steps):
            train_step(trainer, step)
    return trainer.model.eval()


@pytest.mark.parametrize("name", NAMES)
def test_whoever_sees_no_earlier_token_stays_at_chance(name: str) -> None:
    model, task = trained(name, "latent_lookup", 60), tasks.task(name)
    found = score(lambda x: model(x)[0], task, 16, 1000)
    assert found.accuracy < task.chance + 4 * (task.chance / found.right.size) ** 0.5 + 0.003
    assert found.right.shape == (1000, (task.held_out(1, 16)[1] >= 0).sum())
    assert found.exact <= found.accuracy


def test_attention_soon_learns_what_it_does_not() -> None:
    model = trained("copying", "mha", 150)
    found = score(lambda x: model(x)[0], tasks.task("copying"), 16, 200)
    assert found.accuracy > 0.4 > 10 * tasks.task("copying").chance


def test_a_score_is_what_an_oracle_or_a_fool_would_get() -> None:
    """A perfect reader of the copy, one that errs in one letter of every sequence, and one that errs everywhere."""
    task = tasks.task("copying")

    def perfect(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(x.roll(x.shape[1] // 2, 1), len(task.symbols)).float()

    def once(x: torch.Tensor) -> torch.Tensor:
        return perfect(x).index_fill(1, torch.tensor([x.shape[1] - 1]), 0.0)

    scores = [score(reader, task, 20, 30, batch=7) for reader in (perfect, once, lambda x: 0 * perfect(x))]
    assert [round(s.accuracy, 9) for s in scores] == [1.0, 0.9, 0.0]
    assert [s.exact for s in scores] == [1.0, 0.0, 0.0]


def test_a_run_on_a_task_is_a_run_like_any_other(tmp_path: Path) -> None:
    """Resumed as if never interrupted, and examined; a run on text has nothing to examine."""
    model = ModelConfig(vocab_size=1, context=32, n_layers=1, d_model=16, n_heads=2, positions="learned")
    how = TrainConfig(steps=4, batch_size=2, eval_every=2, eval_batches=1, save_every=2, precision="fp32", device="cpu")
    config = RunConfig(name="needle", model=model, data=DataConfig(source="task:needle"), train=how)
    whole = train(config, tmp_path / "run")
    assert whole.status == "done" and whole.val_loss is not None
    found = examine(tmp_path / "run")
    assert [point["length"] for point in found.lengths] == [8, 16, 32], "no further than its learned positions"
    assert {(n, d) for n, d, _ in found.depths} <= {(n, (i + 0.5) / 8) for n in (8, 16, 32) for i in range(8)}
    means = {n: [a for length, _, a in found.depths if length == n] for n in (8, 16, 32)}
    assert all(min(a) <= p["accuracy"] <= max(a) for p in found.lengths for a in [means[int(p["length"])]])
    (tmp_path / "text.txt").write_text("to be or not to be " * 40)
    text = replace(config, data=DataConfig(source=f"text:{tmp_path / 'text.txt'}"))
    train(text, tmp_path / "text")
    with pytest.raises(UserError, match="which is no task; attnlab eval measures text"):
        examine(tmp_path / "text")
    with pytest.raises(UserError, match="'task:needle' is a synthetic task and no text: attnlab compare needle"):
        evaluate_source(tmp_path / "run")
