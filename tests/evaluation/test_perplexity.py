"""Evaluation against witnesses: a plain loop over tokens, lm_eval's windows, transformers' strided perplexity."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import tiny_model, tiny_training

from attnlab import UserError, data, load_model, pretrained
from attnlab.cli import main as cli
from attnlab.config import DataConfig, ModelConfig, RunConfig
from attnlab.data import CharTokenizer
from attnlab.data.prepare import Recipe, prepare
from attnlab.data.tokenizer import ByteTokenizer
from attnlab.data.tokens import Tokens
from attnlab.evaluation.overlap import seen_share
from attnlab.evaluation.perplexity import binned, evaluate, evaluate_source, ratio_error, windows
from attnlab.evaluation.text_size import text_bytes
from attnlab.model import Decoder
from attnlab.results import EvalResult
from attnlab.runs.folder import RunFolder
from attnlab.training.train import train

VOCABULARY = 257  # of bytes, and the end of a document
CONTEXT = 12


def tiny(mechanism: str = "mha", positions: str = "rope", **changes: Any) -> Decoder:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=VOCABULARY, context=CONTEXT, n_layers=2, d_model=32, n_heads=4, mechanisms=(mechanism,),
        positions=positions, options=OPTIONS.get(mechanism, {}) and {mechanism: OPTIONS[mechanism]},
    )  # fmt: skip
    model = Decoder(replace(config, **changes))
    for parameter in model.parameters():  # large enough that a token's past matters
        parameter.data.mul_(4)
    return model


OPTIONS: dict[str, dict[str, Any]] = {"msla": {"top_k": 5, "local": 2}, "mka": {"chunk": 3}, "sliding": {"window": 4}}


def ragged(count: int = 9, seed: int = 0) -> list[list[int]]:
    """Documents of 1 to 40 tokens."""
    draw = np.random.default_rng(seed)
    return [draw.integers(0, 256, n).tolist() for n in draw.integers(1, 41, count)]


@torch.no_grad()
def token_by_token(model: Decoder, document: Sequence[int], context: int) -> list[float]:
    """-log p of each token but the first, each from a pass of its own over the `context` tokens before it."""
    model.eval()
    losses = []
    for at in range(1, len(document)):
        logits, _ = model(torch.tensor([document[max(0, at - context) : at]]))
        losses.append(-logits[0, -1].double().log_softmax(-1)[document[at]].item())
    return losses


@pytest.mark.parametrize(
    "length, context, stride", [(1, 5, 5), (5, 5, 1), (6, 5, 5), (37, 8, 3), (40, 7, 7), (9, 6, 4)]
)
def test_windows_predict_each_token_once_with_enough_before_it(length: int, context: int, stride: int) -> None:
    found = list(windows(length, context, stride))
    predicted = [target for _, stop, scored in found for target in range(stop - scored, stop)]
    assert predicted == list(range(length))
    for start, stop, scored in found:
        assert 0 <= start and stop - start <= context
        first = stop - scored  # the window's first prediction that counts: it has seen first - start + 1 tokens
        assert start == 0 or first - start + 1 > context - stride
    assert len(found) == 1 + math.ceil(max(0, length - context) / stride)


@pytest.mark.parametrize("stride", [8, 3, 1])
def test_windows_are_lm_evals(stride: int) -> None:
    from lm_eval.utils import get_rolling_token_windows

    for length in (1, 3, 7, 8, 9, 30, 33):
        text = list(range(100, 100 + length))
        theirs = list(get_rolling_token_windows(text, prefix_token=99, max_seq_len=8, context_len=8 - stride + 1))
        assert [
            ([99, *text][start:stop], text[stop - n : stop]) for start, stop, n in windows(length, 8, stride)
        ] == theirs


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_stride_one_is_a_loop_over_tokens(positions: str) -> None:
    model, documents = tiny(positions=positions), ragged()
    wanted = [token_by_token(model, document, CONTEXT) for document in documents]
    found = evaluate(model, documents, stride=1, batch_size=5)
    assert found.tokens == sum(map(len, wanted)) == sum(map(len, documents)) - len(documents)
    assert found.loss == pytest.approx(np.mean(np.concatenate(wanted)), abs=1e-6)
    assert found.perplexity == pytest.approx(math.exp(found.loss))


@pytest.mark.parametrize("stride", [CONTEXT, 5])
def test_the_end_of_a_document_stands_before_the_first_token_and_is_not_predicted(stride: int) -> None:
    model, tokenizer = tiny(), ByteTokenizer()
    documents = ragged(5)
    wanted = [token_by_token(model, [256, *document], CONTEXT) for document in documents]
    ended = [[*document, 256] for document in documents]
    row = Tokens.of(np.concatenate(ended), np.cumsum([0, *map(len, ended[:-1])]))
    for given in (documents, ended, row):
        found = evaluate(model, given, stride=1, tokenizer=tokenizer)
        assert found.loss == pytest.approx(np.mean(np.concatenate(wanted)), abs=1e-6)
        assert found.tokens == sum(map(len, documents))
        assert found.documents == 5
    single = evaluate(model, [documents[0][:1]], stride=stride, tokenizer=tokenizer)
    assert single.loss == pytest.approx(wanted[0][0], abs=1e-6)


def test_another_token_may_stand_in_front() -> None:
    model, documents = tiny(), ragged(4)
    wanted = [token_by_token(model, [5, *document], CONTEXT) for document in documents]
    ended = [[*document, 256] for document in documents]
    found = evaluate(model, ended, stride=1, tokenizer=ByteTokenizer(), front=5)
    assert found.tokens == sum(map(len, documents))
    assert found.loss == pytest.approx(np.mean(np.concatenate(wanted)), abs=1e-6)


MECHANISMS = ["mha", "mqa", "gqa", "mla", "msla", "mka", "fast_mka", "sliding"]


@pytest.mark.parametrize("positions", ["rope", "learned"])
@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("stride", [CONTEXT, 5])
def test_the_batch_size_changes_nothing(mechanism: str, positions: str, stride: int) -> None:
    model, documents = tiny(mechanism, positions), ragged(11)
    found = {
        size: evaluate(model, documents, stride=stride, batch_size=size, tokenizer=ByteTokenizer())
        for size in (1, 3, 8)
    }
    for size in (3, 8):
        assert found[size].loss == pytest.approx(found[1].loss, abs=1e-6, rel=0)
        assert found[size].stderr == pytest.approx(found[1].stderr, abs=1e-6, rel=0)
        assert np.allclose(found[size].by_position, found[1].by_position, atol=1e-5, rtol=0)


def test_order_and_company_of_documents_change_nothing() -> None:
    model, documents = tiny(), ragged(7)
    whole = evaluate(model, documents, stride=4)
    assert evaluate(model, documents[::-1], stride=4).loss == pytest.approx(whole.loss, abs=1e-6)
    alone = [evaluate(model, [document], stride=4) for document in documents if len(document) > 1]
    total = sum(result.tokens for result in alone)
    assert total == whole.tokens
    assert sum(result.loss * result.tokens for result in alone) / total == pytest.approx(whole.loss, abs=1e-6)


def test_a_smaller_stride_shows_more_and_the_largest_reads_once() -> None:
    """By position: with stride 1, all but the first C - 1 tokens of a document have seen exactly C."""
    model, document = tiny(), ragged(1, seed=3)[0] * 3
    found = evaluate(model, [document], stride=1)
    last = found.by_position[-1]
    assert last[1] == CONTEXT
    assert sum(row[2] for row in found.by_position) == found.tokens == len(document) - 1
    assert sum(row[2] * row[3] for row in found.by_position) / found.tokens == pytest.approx(found.loss)
    wanted = token_by_token(model, document, CONTEXT)
    assert found.by_position[0][3] == pytest.approx(wanted[0], abs=1e-5)
    assert last[3] == pytest.approx(np.mean(wanted[last[0] - 1 :]), abs=1e-5)


def test_bins_double() -> None:
    losses, counts = np.arange(1.0, 11.0), np.ones(10)
    assert [row[:2] for row in binned(losses, counts)] == [[1, 1], [2, 2], [3, 4], [5, 8], [9, 10]]
    assert binned(losses, counts)[2] == [3, 4, 2, 3.5]
    assert binned(losses, np.r_[0, 0, counts[2:]])[0][:2] == [3, 4]


def test_the_standard_error_is_that_of_a_bootstrap_over_documents() -> None:
    draw = np.random.default_rng(0)
    counts = draw.integers(5, 200, 300)
    sums = counts * (3 + draw.normal(0, 0.5, 300)) + draw.normal(0, 2, 300)
    again = [(sums[i].sum() / counts[i].sum()) for i in draw.integers(0, 300, (2000, 300))]
    assert ratio_error(sums, counts) == pytest.approx(np.std(again), rel=0.1)
    equal = np.full(300, 7)  # documents of one length: the error of a mean
    assert ratio_error(sums, equal) == pytest.approx(np.std(sums / 7, ddof=1) / 300**0.5)
    assert ratio_error(sums[:1], counts[:1]) is None
    assert ratio_error(np.r_[sums, 0], np.r_[counts, 0]) == ratio_error(sums, counts)


def test_bytes_are_those_of_the_predicted_text() -> None:
    model, tokenizer = tiny(), ByteTokenizer()
    texts = ["naïve café", "日本語のテキスト", "plain"]
    found = evaluate(model, [tokenizer.encode(text) for text in texts], tokenizer=tokenizer)
    assert found.bytes == sum(len(text.encode()) for text in texts) == found.tokens
    assert found.bits_per_byte == pytest.approx(found.loss / math.log(2))
    characters = CharTokenizer.of("".join(texts))  # has no end: the first character of each is not predicted
    model = tiny(vocab_size=characters.vocab_size)
    found = evaluate(model, [characters.encode(text) for text in texts], tokenizer=characters)
    assert found.bytes == sum(len(text[1:].encode()) for text in texts)
    assert found.tokens == sum(len(text) - 1 for text in texts)
    assert found.bits_per_byte == pytest.approx(found.loss * found.tokens / math.log(2) / found.bytes)
    assert evaluate(model, [[1, 2, 3]]).bits_per_byte is None


def test_bytes_are_counted_in_pieces_that_cut_no_character(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnlab.evaluation.text_size.PIECE", 5)
    tokenizer, text = ByteTokenizer(), "ab日本語🙂🙂é\ufffd\ufffd\ufffd end"
    ids = tokenizer.encode(text)
    assert text_bytes(tokenizer, Tokens.of(np.array(ids)), 0, len(ids)) == len(text.encode())
    assert text_bytes(tokenizer, Tokens.of(np.array(ids)), 2, 8) == 6


def test_a_context_beyond_training_needs_rotary_positions() -> None:
    longer = [list(range(40))]
    assert evaluate(tiny(), longer, context=30).context == 30
    assert evaluate(tiny(positions="learned"), longer, context=7).stride == 7
    with pytest.raises(UserError, match=r"context is 30.* from 1 to 12"):
        evaluate(tiny(positions="learned"), longer, context=30)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"stride": 13}, "stride is 13: give from 1 to the context, 12"),
        ({"stride": 0}, "stride is 0"),
        ({"context": 0, "stride": None}, "context is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"documents": []}, "no token to predict"),
        ({"documents": [[5], []]}, "no token to predict"),
        ({"documents": [[5, 257]]}, "vocabulary of 257 lacks"),
        ({"documents": [[5, -1, 4]]}, "vocabulary of 257 lacks"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"documents": ragged(2), **change}
    with pytest.raises(UserError, match=message):
        evaluate(tiny(), given.pop("documents"), **given)


def test_the_model_is_left_as_it_was_and_the_record_is_json() -> None:
    model = tiny(dropout=0.3).train()
    first, second = (evaluate(model, ragged(3)) for _ in range(2))
    assert model.training and first.loss == second.loss
    again = EvalResult.from_dict(json.loads(json.dumps(first.to_dict())))
    assert again == first


VERSE = "".join(f"{n} bottles of beer on the wall, {n} bottles; take {n % 7} down. " for n in range(130))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with texts, and a run that has learnt nothing of one of them."""
    place = tmp_path_factory.mktemp("evaluate")
    prose = np.random.default_rng(0).choice(list("abdef ,;."), 4000)
    (place / "verse.txt").write_text(VERSE)
    (place / "prose.txt").write_text("".join(prose))
    (place / "half.txt").write_text(VERSE[:3000] + "".join(prose))
    (place / "short.txt").write_text("take 5 down.")
    save(place / "run", DataConfig(source=f"text:{place}/verse.txt"))
    return place


def save(path: Path, source: DataConfig) -> None:
    corpus = data.load(source)
    model = tiny(vocab_size=corpus.vocab_size)
    folder = RunFolder.create(path, RunConfig(model=model.config, data=source), corpus)
    folder.save(7, model, {}, {"seconds": 0.0, "interval": []})


def test_a_run_is_evaluated_on_its_own_held_out_text(place: Path) -> None:
    model, config = load_model(place / "run")
    corpus = data.load(config.data)
    found = evaluate_source(place / "run", device="cpu")
    held_out = VERSE[int(len(VERSE) * 0.9) :]
    assert (found.split, found.seen, found.step, found.mechanism) == ("val", 0, 7, "mha")
    assert found.data == f"text:{place}/verse.txt" and found.model == f"{place}/run"
    assert found.tokens == found.bytes == len(held_out) - 1
    assert found.loss == evaluate(model, [corpus.tokenizer.encode(held_out)], tokenizer=corpus.tokenizer).loss
    assert evaluate_source(place / "run", found.data, device="cpu").loss == found.loss
    with pytest.raises(UserError, match=r"unknown split of .* 'test': expected one of val, train"):
        evaluate_source(place / "run", split="test", device="cpu")
    trained = evaluate_source(place / "run", split="train", device="cpu")
    assert (trained.split, trained.seen) == ("train", None)
    assert trained.tokens == int(len(VERSE) * 0.9) - 1


def test_another_text_is_taken_whole_and_looked_for_in_the_training_part(place: Path) -> None:
    assert evaluate_source(place / "run", f"text:{place}/prose.txt", device="cpu").seen == 0
    (place / "same.txt").write_text(VERSE)
    with pytest.raises(UserError, match=r"88% of the passages .* give text that it was not trained on$"):
        evaluate_source(place / "run", f"text:{place}/same.txt", device="cpu")
    (place / "new.txt").write_text(VERSE[-1200:])  # the held-out part lies in it
    assert evaluate_source(place / "run", f"text:{place}/new.txt", device="cpu").split == "all"
    found = evaluate_source(place / "run", f"text:{place}/short.txt", device="cpu")
    assert (found.seen, found.tokens) == (None, 11)  # too short to be looked for
    found = evaluate_source(place / "run", f"text:{place}/half.txt", device="cpu")
    assert 0.2 < found.seen < 0.5
    with pytest.raises(UserError, match="has no parts"):
        evaluate_source(place / "run", f"text:{place}/short.txt", "test", device="cpu")


def test_a_corpus_whose_validation_part_is_in_its_training_part_is_refused(place: Path) -> None:
    (place / "twice.txt").write_text(VERSE[:2000] + VERSE[:2000])
    save(place / "twice", DataConfig(source=f"text:{place}/twice.txt"))
    with pytest.raises(UserError, match=r"are in the training part of .*, or say --split train"):
        evaluate_source(place / "twice", device="cpu")
    assert evaluate_source(place / "twice", split="train", device="cpu").split == "train"


def test_a_corpus_that_has_changed_is_no_longer_known_to_be_held_out(tmp_path: Path) -> None:
    text, other = tmp_path / "text.txt", tmp_path / "other.txt"
    text.write_text(VERSE)
    other.write_text(VERSE[:2000])
    save(tmp_path / "run", DataConfig(source=f"text:{text}"))
    with pytest.raises(UserError, match="100% of the passages"):
        evaluate_source(tmp_path / "run", f"text:{other}", device="cpu")
    for change in (lambda: text.write_text(VERSE + VERSE[:500]), text.unlink):
        change()
        for split in ("val", "train"):
            with pytest.raises(UserError, match="is gone or has changed, so nobody knows what is held out"):
                evaluate_source(tmp_path / "run", split=split, device="cpu")
        assert evaluate_source(tmp_path / "run", f"text:{other}", device="cpu").seen is None


def test_passages_are_found_across_the_seams_of_what_is_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnlab.evaluation.overlap.CHUNK", 100)
    draw = np.random.default_rng(0)
    training, other = draw.integers(0, 50, 1000), draw.integers(0, 50, 1000)
    assert seen_share(Tokens.of(training), Tokens.of(training)) == 1
    assert seen_share(Tokens.of(other), Tokens.of(training)) == 0
    documents = np.arange(0, 1000, 100)
    half = np.where(np.arange(1000) // 100 % 2, training, other)
    assert 0.3 < seen_share(Tokens.of(half, documents), Tokens.of(training)) < 0.7
    assert seen_share(Tokens.of(training, np.arange(0, 1000, 50)), Tokens.of(training)) is None


def test_an_exported_model_gives_the_same_numbers(place: Path) -> None:
    exported = pretrained.save(pretrained.load(place / "run"), place / "exported")
    found = evaluate_source(exported, f"text:{place}/verse.txt", device="cpu")
    assert (found.seen, found.split) == (None, "all")
    model, _ = load_model(place / "run")
    tokenizer = RunFolder.open(place / "run").tokenizer()
    assert found.loss == pytest.approx(evaluate(model, [tokenizer.encode(VERSE)], tokenizer=tokenizer).loss)
    with pytest.raises(UserError, match="does not say what it was trained on"):
        evaluate_source(exported, device="cpu")
    config = json.loads((exported / "config.json").read_text())
    (exported / "config.json").write_text(json.dumps({**config, "bos_token_id": 3}))
    begun = evaluate_source(exported, f"text:{place}/verse.txt", device="cpu")
    wanted = evaluate(model, [tokenizer.encode(VERSE)], tokenizer=tokenizer, front=3)
    assert (begun.tokens, begun.loss) == (found.tokens + 1, pytest.approx(wanted.loss))


def test_records_are_documents(place: Path, tmp_path: Path) -> None:
    documents = [VERSE, VERSE[::-1]]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps({"body": each}) + "\n" for each in documents))
    exported = pretrained.save(pretrained.load(place / "run"), tmp_path / "exported")
    found = evaluate_source(exported, f"jsonl:{tmp_path / 'docs.jsonl'}#body", device="cpu")
    model, _ = load_model(place / "run")
    tokenizer = RunFolder.open(place / "run").tokenizer()
    wanted = evaluate(model, [tokenizer.encode(each) for each in documents], tokenizer=tokenizer)
    assert (found.documents, found.split, found.loss) == (2, "all", pytest.approx(wanted.loss))
    with pytest.raises(UserError, match="has no parts"):
        evaluate_source(exported, f"jsonl:{tmp_path / 'docs.jsonl'}#body", "test", device="cpu")


def test_the_command(place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["eval", f"{place}/run", "--device", "cpu"]
    assert cli.main(words) == 0
    shown = capsys.readouterr().out
    assert "perplexity" in shown and "bits per byte" in shown and "1 document" in shown and "5 to 8" in shown
    assert cli.main([*words, "--json", "--stride", "3", "--batch-size", "2", "--out", f"{tmp_path}/eval.json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "eval.json").read_text())
    assert (found["stride"], found["split"]) == (3, "val")
    assert cli.main([*words, "--split", "train"]) == 0
    said = capsys.readouterr()
    assert "not held out" in said.err and "train" in said.out
    assert cli.main([*words, "--stride", "99"]) == 2
    assert "the stride is 99" in capsys.readouterr().err
    assert cli.main([*words, "--split", "dev"]) == 2


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A tiny GPT-2 as transformers makes it, and the folder it saved itself into."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    shape = {"n_positions": 17, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}
    config = GPT2Config(vocab_size=VOCABULARY, bos_token_id=256, eos_token_id=256, **shape)
    theirs = GPT2LMHeadModel(config).eval()
    folder = tmp_path_factory.mktemp("gpt2")
    theirs.save_pretrained(folder)
    return theirs, folder


@pytest.mark.parametrize("stride", [16, 6, 1])
def test_strided_perplexity_is_that_of_transformers(gpt2: tuple[Any, Path], stride: int) -> None:
    """The recipe of its guide on perplexity, but that a window's loss counts for all the tokens it is the mean of: the
    guide takes one off in every window, as if each began at an unlabelled token, which only the first does."""
    theirs, folder = gpt2
    length, ids = 17, torch.randint(256, (1, 17 + 5 * stride), generator=torch.Generator().manual_seed(0))
    total, count, before = 0.0, 0, 0
    for begin in range(0, ids.shape[1], stride):
        end = min(begin + length, ids.shape[1])
        labels = ids[:, begin:end].clone()
        labels[:, : -(end - before)] = -100
        with torch.no_grad():
            loss = theirs(ids[:, begin:end], labels=labels).loss.double().item()
        labelled = int((labels[:, 1:] != -100).sum())
        total, count, before = total + loss * labelled, count + labelled, end
        if end == ids.shape[1]:
            break
    found = evaluate(pretrained.load(folder).model, [ids[0].tolist()], context=length - 1, stride=stride)
    assert (found.tokens, found.loss) == (count, pytest.approx(total / count, abs=1e-6))
    assert found.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty short stories to train on, ten to validate, five to test, in bytes."""
    place = tmp_path_factory.mktemp("prepared")
    for split, numbers in (("train", range(20)), ("val", range(100, 110)), ("test", range(200, 205))):
        (place / f"{split}.txt").write_text("\n".join(f"Story {n}: {'é' * n} met {n * n} cats.\n" for n in numbers))
    sources = {split: f"text:{place}/{split}.txt" for split in ("val", "test")}
    recipe = Recipe(source=f"text:{place}/train.txt", tokenizer="byte", documents="blank", **sources)
    prepare(recipe, place / "bytes", workers=1)
    return place


def test_the_documents_of_a_prepared_corpus(prepared: Path) -> None:
    save(prepared / "run", DataConfig(source=f"prepared:{prepared}/bytes"))
    for split, count in (("val", 10), ("test", 5), ("train", 20)):
        found = evaluate_source(prepared / "run", split=split, device="cpu")
        assert (found.split, found.documents) == (split, count)
        assert found.tokens == found.bytes == len((prepared / f"{split}.txt").read_bytes())
        assert 0 < found.stderr < found.loss
    text = (prepared / "test.txt").read_text()
    model, _ = load_model(prepared / "run")
    whole = evaluate(model, [ByteTokenizer().encode(text)], tokenizer=ByteTokenizer())
    found = evaluate_source(prepared / "run", f"text:{prepared}/test.txt", device="cpu")
    assert (found.loss, found.split, found.documents) == (pytest.approx(whole.loss), "all", 1)


def test_a_corpus_in_other_tokens_is_read_as_text(prepared: Path) -> None:
    """The bytes stay the same, whatever the tokens: what bits per byte are there for."""
    letters = "".join((prepared / f"{split}.txt").read_text() for split in ("train", "val", "test"))
    (prepared / "letters.txt").write_text(letters)
    save(prepared / "letters", DataConfig(source=f"text:{prepared}/letters.txt"))
    found = evaluate_source(prepared / "letters", f"prepared:{prepared}/bytes", "train", device="cpu")
    text = (prepared / "train.txt").read_text()
    assert found.documents == 20
    assert found.tokens == len(text) - 20  # characters, and of each document all but the first
    assert found.bytes == len(text.encode()) - 20


@pytest.mark.parametrize("end", [True, False])
def test_bits_per_byte_are_over_the_text_and_not_over_what_a_tokenizer_leaves_of_it(tmp_path, end):
    pytest.importorskip("tokenizers", reason="tokenizers is not installed: pip install 'attnlab[data]'")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<unk>", "</s>"] if end else ["<unk>"]
    made.train_from_iterator(["the mouse met a cat"], trainers.BpeTrainer(special_tokens=special, show_progress=False))
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "train.txt").write_text("the mouse met a cat\n" * 30)
    (tmp_path / "held.txt").write_text("the 🐭 met a Кошка\n" * 7)
    recipe = Recipe(
        source=f"text:{tmp_path / 'train.txt'}",
        val=f"text:{tmp_path / 'held.txt'}",
        documents="line",
        tokenizer=str(tmp_path / "tokenizer.json"),
    )
    prepare(recipe, tmp_path / "out")
    whole = len((tmp_path / "held.txt").read_bytes())
    config = RunConfig(
        model=tiny_model(), data=DataConfig(source=f"prepared:{tmp_path / 'out'}"), train=tiny_training(steps=2)
    )
    train(config, tmp_path / "run")
    found = evaluate_source(tmp_path / "run")
    first = 0 if end else 7 * len("t")  # without an end of document, the first token is not predicted
    assert whole - 7 * len("the") <= found.bytes <= whole - first and (found.bytes == whole or not end)
    assert found.bits_per_byte == pytest.approx(found.loss * found.tokens / math.log(2) / found.bytes)
    other = evaluate_source(tmp_path / "run", f"text:{tmp_path / 'held.txt'}")
    assert other.documents == 1 and whole - 3 <= other.bytes <= whole
    corpus = data.load(config.data)
    ids = corpus.val.read(0, len(corpus.val)).tolist()
    alone = evaluate(pretrained.load(tmp_path / "run").model, [ids], tokenizer=corpus.tokenizer)
    assert alone.bytes is None and alone.bits_per_byte is None  # of bare ids, nobody knows what <unk> was
