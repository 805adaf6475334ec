"""Whole documents in a row: which go where, that none sees another, and how training counts rows that are not full."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from attnlab import attention, data
from attnlab.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from attnlab.data import packing
from attnlab.documents import PackedRows
from attnlab.errors import UserError
from attnlab.model import Decoder
from attnlab.recording import record_losses
from attnlab.runs.folder import RunFolder
from attnlab.training.train import Trainer, resolve, train, train_step, validate

# -- which document goes where ---------------------------------------------------------------------------------------


def by_hand(documents: list[int], tokens: int, context: int, front: int) -> list[list[tuple[int, int, int]]]:
    """The rows, as (start, places, document) of their pieces: next-fit, one piece after another."""
    rows: list[list[tuple[int, int, int]]] = []
    for number, (start, stop) in enumerate(zip(documents, [*documents[1:], tokens], strict=True)):
        for at in range(max(start - front, 0), stop - 1, context):
            places = min(context, stop - 1 - at)
            if not rows or sum(size for _, size, _ in rows[-1]) + places > context:
                rows.append([])
            rows[-1].append((at, places, number))
    return rows


def some_corpus(seed: int) -> tuple[data.Tokens, int]:
    """Documents of 1 token and more, some longer than the context; sometimes an empty one at the end."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, rng.integers(2, 30), rng.integers(1, 30))
    documents = np.concatenate([[0], np.cumsum(lengths)])[: len(lengths) + (seed % 5 == 0)]
    return data.Tokens.of(rng.integers(0, 1000, lengths.sum()), documents), int(rng.integers(1, 12))


@pytest.mark.parametrize("front", [0, 1])
@pytest.mark.parametrize("seed", range(30))
def test_rows_hold_whole_documents_in_their_order(seed, front, monkeypatch):
    monkeypatch.setattr(packing, "BLOCK", 1 + seed % 7)  # a row may go on where a block of documents ends
    monkeypatch.setattr(packing, "LONG", 1000)  # no document is
    tokens, context = some_corpus(seed)
    want = by_hand(tokens.documents.tolist(), len(tokens), context, front)
    begun = packing.row_starts(tokens.documents, len(tokens), context, front)
    assert begun.tolist() == [row[0][0] for row in want]
    which = np.random.default_rng(seed).permutation(len(want))
    ids = tokens.read(0, len(tokens))
    for row, x, y, documents in zip(which, *packing.read_rows(tokens, begun, which, context, front), strict=True):
        places = np.concatenate([np.arange(at, at + size) for at, size, _ in want[row]])
        whose = np.concatenate([np.full(size, number) for _, size, number in want[row]])
        rest = [-1] * (context - len(places))
        assert x.tolist() == [*ids[places].tolist(), *([0] * len(rest))]
        assert y.tolist() == [*ids[places + 1].tolist(), *rest]
        real = documents[: len(places)]
        assert documents[len(places) :].tolist() == rest and real.min() >= 0
        assert ((whose[:, None] == whose) == (real[:, None] == real)).all()


@pytest.mark.parametrize("tokenizer", [None, data.ByteTokenizer()])
def test_an_epoch_predicts_every_token_once_but_a_first_that_nothing_announces(tokenizer):
    texts = ["a", "bc", "defgh" * 9, "ij", "", "klmnopqrst", "uvw" * 5]
    corpus = data.from_texts([text + "." for text in texts], "texts", 0.05, tokenizer, "documents")
    rows = len(corpus.row_starts("train", 16))
    parts = [corpus.batch(3, step, 2, 16) for step in range(3 * rows)]
    ids = corpus.train.read(0, len(corpus.train)).tolist()
    starts = {*corpus.train.documents.tolist()} if tokenizer is None else {0}
    want = sorted((ids[i - 1], ids[i]) for i in range(1, len(ids)) if i not in starts)
    for epoch in range(6):
        taken = [rows * epoch + i for i in range(rows)]
        pairs = [(parts[n // 2].x[n % 2], parts[n // 2].y[n % 2]) for n in taken]
        assert sorted((a, b) for x, y in pairs for a, b in zip(x.tolist(), y.tolist(), strict=True) if b >= 0) == want
    assert sum(part.counted() for part in parts[: rows // 2]) > 0


@pytest.mark.parametrize("front", [0, 1])
@pytest.mark.parametrize("places", [60 * 24, 60 * 24 + 1, 60 * 24 + 23, 60 * 24 - 1, 17 * 24 + 5, 15 * 24 + 1])
def test_a_long_document_is_cut_at_every_place_of_a_period(places, front):
    """Nothing of it is lost or read twice, and it takes one row more at most."""
    before = 30
    tokens = data.Tokens.of(np.arange(before + places + 1 - front), np.array([0, before]))
    begun = packing.row_starts(tokens.documents, len(tokens), 24, front)
    rows = packing.read_rows(tokens, begun, np.arange(len(begun)), 24, front)
    read = rows.x[rows.y >= 0]
    assert sorted(read.tolist()) == sorted({*range(len(tokens) - 1)} - ({before - 1} if not front else set()))
    assert (rows.y[rows.y >= 0] == read + 1).all()
    assert len(begun) <= -(-places // 24) + 1 + 2
    if places > 50 * 24:
        for period in (2, 3, 4, 6, 8, 12, 24):
            seen = np.bincount((begun[2:] - before) % period, minlength=period)
            assert seen.min() > 0 and seen.max() < 2.2 * len(begun) / period + 2


# -- that none sees another ------------------------------------------------------------------------------------------

SPANS = [
    (0, 0, 7),
    (0, 7, 8),
    (0, 8, 24),
    (1, 0, 24),
    (2, 0, 11),
    (2, 11, 13),
]  # row, start, stop: the last has padding


def packed_rows(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(0, 65, (3, 24), generator=torch.Generator().manual_seed(seed))
    documents = torch.full((3, 24), -1)
    for number, (row, start, stop) in enumerate(SPANS):
        documents[row, start:stop] = number
    return tokens, documents


def decoder(**fields) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(ModelConfig(d_model=16, n_heads=2, **{"context": 64, "n_layers": 2, **fields})).double()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()


MODELS = [
    *[pytest.param({"mechanisms": (name,)}, id=name) for name in attention.names()],
    pytest.param({"mechanisms": ("sliding", "fast_mka", "mla"), "n_layers": 3}, id="hybrid"),
    pytest.param({"mechanisms": ("mka", "msla"), "options": {"mka": {"chunk": 3}, "msla": {"top_k": 4}}}, id="chunks"),
    pytest.param({"positions": "learned", "bias": True}, id="learned positions"),
    pytest.param({"ff": "moe", "norm": "rms"}, id="experts"),
]


@pytest.mark.parametrize("fields", MODELS)
def test_packed_is_alone(fields):
    """Logits and loss; and where one document changes, no other does."""
    model, (tokens, documents) = decoder(**fields), packed_rows()
    logits, _ = model(tokens, documents=documents)
    alone = {span: model(tokens[span[0] : span[0] + 1, span[1] : span[2]])[0][0] for span in SPANS}
    for (row, start, stop), want in alone.items():
        torch.testing.assert_close(logits[row, start:stop], want, rtol=1e-9, atol=1e-9)
    targets = torch.where(documents >= 0, tokens.roll(-1, 1), -1)
    wanted = torch.cat([targets[row, start:stop] for row, start, stop in SPANS])
    one, other = model.loss(tokens, targets, documents), cross_entropy(torch.cat(list(alone.values())), wanted)
    assert one.item() == pytest.approx(other.item(), rel=1e-6)  # a loss is added up in float32
    with torch.no_grad():
        changed = torch.where(documents == 2, (tokens + 1) % 65, tokens)
        moved = (model(changed, documents=documents)[0] - logits).abs().amax(2) > 1e-12
    assert moved[documents == 2].any() and not moved[(documents != 2) & (documents >= 0)].any()


def test_gradients_are_those_of_the_documents_alone():
    model, (tokens, documents) = decoder(mechanisms=("mka", "sliding")), packed_rows()
    logits, _ = model(tokens, documents=documents)
    one = torch.autograd.grad(logits[documents >= 0].square().sum(), list(model.parameters()))
    parts = [model(tokens[row : row + 1, start:stop])[0].square().sum() for row, start, stop in SPANS]
    for a, b in zip(one, torch.autograd.grad(sum(parts), list(model.parameters())), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("fields", [{"ff": "moe"}, {"mechanisms": ("msla",), "options": {"msla": {"top_k": 4}}}])
def test_padding_takes_no_part_in_auxiliary_losses(fields):
    model, (tokens, documents) = decoder(**fields), packed_rows()
    found = []
    for junk in (0, 7):
        with record_losses() as losses:
            model(torch.where(documents >= 0, tokens, junk), documents=documents)
        found.append([float(value) for values in losses.values() for value in values])
    with record_losses() as losses:  # the same documents with more padding
        wide = [torch.nn.functional.pad(t, (0, 9), value=v) for t, v in ((tokens, 3), (documents, -1))]
        model(wide[0], documents=wide[1])
    found.append([float(value) for values in losses.values() for value in values])
    assert found[0] and found[0] == found[1] == pytest.approx(found[2], rel=1e-12)


def test_apart_and_together_again():
    documents = torch.tensor([[4, 4, 2, -1, 2, 9], [-1, -1, -1, -1, -1, -1], [0, 0, 0, 1, 1, -1]])
    packed = PackedRows.of(documents)
    assert packed.positions.tolist() == [[0, 1, -1], [0, -1, -1], [0, -1, -1], [0, -1, -1], [0, 1, 2], [0, 1, -1]]
    assert packed.places.tolist() == [[0, 1, 0, 0, 0, 0, 1, 2, 0, 1]]
    x = torch.randn(3, 6, 5)
    seen = []

    def watch(rows, positions, cache, mask):
        seen.append(rows)
        return 2 * rows, cache

    y = packed.unpacked(packed.attend(watch, packed.packed(x)))
    assert torch.equal(y, torch.where((documents >= 0)[..., None], 2 * x, 0))
    assert torch.equal(seen[0][4], x[2, :3]) and not seen[0][packed.positions < 0].any()
    nothing = PackedRows.of(torch.full((2, 3), -1))
    assert nothing.positions.tolist() == [[-1]] and nothing.packed(x[:2, :3]).shape == (1, 0, 5)


def test_documents_go_without_positions_and_cache():
    model, (tokens, documents) = decoder(), packed_rows()
    for given in ({"cache": model.empty_cache(3, 24)}, {"positions": torch.arange(24).expand(3, -1)}):
        with pytest.raises(UserError, match="have positions of their own and no cache"):
            model(tokens, documents=documents, **given)
    with pytest.raises(UserError, match="25 tokens are longer than the 24 learned positions"):
        zeros = torch.zeros(1, 25, dtype=torch.int64)
        decoder(positions="learned", context=24)(zeros, documents=zeros)


# -- training on rows that are not full ------------------------------------------------------------------------------

WORDS = ["the quick brown fox", "jumps", "over the lazy dog; ", "pack my box with five dozen liquor jugs", "."]


@pytest.fixture
def config(tmp_path) -> RunConfig:
    (tmp_path / "texts").mkdir()
    rng = np.random.default_rng(0)
    for i in range(60):
        (tmp_path / "texts" / f"{i:02d}.txt").write_text(" ".join(rng.choice(WORDS, rng.integers(1, 6))))
    shape = ModelConfig(context=48, n_layers=1, d_model=16, n_heads=2)
    steps = TrainConfig(
        steps=6, batch_size=2, accumulate=2, log_every=2, eval_every=3, eval_batches=2, save_every=3, precision="fp32"
    )
    packed = DataConfig(source=f"text:{tmp_path / 'texts'}", pack="documents")
    return RunConfig(model=shape, data=packed, train=replace(steps, device="cpu"), seed=1)


@pytest.mark.parametrize(("mechanism", "precision"), [("mha", "fp32"), ("msla", "bf16")])
def test_a_packed_run_goes_on_as_if_never_interrupted_and_counts_real_tokens(config, tmp_path, mechanism, precision):
    config = replace(config, model=replace(config.model, mechanisms=(mechanism,), dropout=0.1))
    config = replace(config, train=replace(config.train, precision=precision))
    whole = train(config, tmp_path / "whole")

    def stop(event: dict) -> None:
        if event["step"] == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "parts", progress=stop)
    again = train(config, tmp_path / "parts", resume=True)
    assert (again.curve, again.train_curve, again.tokens) == (whole.curve, whole.train_curve, whole.tokens)
    one, other = (RunFolder.open(tmp_path / name).load().model for name in ("whole", "parts"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    corpus = resolve(config)[1]
    assert whole.tokens == sum(corpus.batch(1, step, 4, 48).counted() for step in range(6)) < 6 * 4 * 48


@pytest.mark.parametrize("fields", [{}, {"ff": "moe", "balance": "bias"}])
def test_accumulated_parts_weigh_as_much_as_they_hold(config, fields):
    config = replace(config, model=replace(config.model, **fields))
    whole = replace(config, train=replace(config.train, batch_size=6, accumulate=1))
    parts = replace(config, train=replace(config.train, batch_size=1, accumulate=6))
    trained = []
    for each in (whole, parts):
        trainer = Trainer.of(*resolve(each))
        trainer.model.double().eval()  # no choice of experts that depends on how often they were counted
        steps = [train_step(trainer, step) for step in range(3)]
        trained.append([*trainer.model.parameters(), *(value.double() for step in steps for value in step[:2])])
    counts = {part.counted() for part in trainer.batch(0)}
    assert len(counts) > 2  # the parts are not alike
    for a, b in zip(*trained, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_validation_is_the_mean_over_real_tokens(config):
    trainer = Trainer.of(*resolve(config))
    x, y, documents = trainer.corpus.windows(4, 48)
    assert documents is not None and bool((documents < 0).any()) and torch.equal(documents >= 0, y >= 0)
    losses = []
    with torch.no_grad():
        for row in range(4):
            for number in documents[row].unique().tolist():
                if number >= 0:
                    own = documents[row] == number
                    losses.append(cross_entropy(trainer.model(x[row, own][None])[0][0], y[row, own], reduction="none"))
    assert validate(trainer) == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)


def test_a_corpus_of_single_tokens_has_nothing_to_learn():
    corpus = data.from_texts(["a", "b", "c", "d"], val_fraction=0.5, pack="documents")
    with pytest.raises(UserError, match=r"the training part of .* has 2 tokens and nothing to predict; give more text"):
        corpus.batch(0, 0, 1, 4)
