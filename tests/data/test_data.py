from __future__ import annotations

import hashlib
import inspect
import json
from importlib.resources import files

import numpy as np
import pytest
import torch

from attnlab import data
from attnlab.cli import compare, train
from attnlab.config import DataConfig
from attnlab.data import packing, texts
from attnlab.data.load import KINDS, SourceKind
from attnlab.data.prepare import Recipe, prepare
from attnlab.data.tokenizer import ByteTokenizer
from attnlab.errors import UserError

TEXT = "the quick brown fox jumps over the lazy dog\n" * 9


@pytest.fixture(scope="module")
def shakespeare() -> data.Corpus:
    return data.load(DataConfig())


def ids_of(corpus: data.Corpus) -> list[int]:
    """Every token, training part first."""
    return torch.cat([tokens.read(0, len(tokens)) for tokens in (corpus.train, corpus.val)]).tolist()


def counting(tokens: int, val_fraction: float = 0.5) -> data.Corpus:
    """A corpus in which every token is its own place."""
    return data.from_text("".join(chr(0x4E00 + i) for i in range(tokens)), "counting", val_fraction)


def test_shakespeare_is_nanogpts(shakespeare):
    content = (files("attnlab.data") / "tinyshakespeare.txt").read_bytes()
    assert hashlib.sha256(content).hexdigest() == "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
    assert (len(shakespeare.train), len(shakespeare.val), shakespeare.vocab_size) == (1_003_854, 111_540, 65)
    assert shakespeare.tokenizer.chars == "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
    # nanoGPT's prepare.py: the first and last ids of each part
    assert shakespeare.train.read(0, 5).tolist() == [18, 47, 56, 57, 58]
    assert shakespeare.val.read(0, 3).tolist() == [12, 0, 0]
    whole = ids_of(shakespeare)
    assert shakespeare.tokenizer.decode(whole) == content.decode()


def test_the_packaged_text_is_checked(monkeypatch):

    texts.shakespeare.cache_clear()
    monkeypatch.setattr(texts, "SHAKESPEARE_SHA256", "0" * 64)
    with pytest.raises(UserError, match="sha256"):
        data.load(DataConfig())


def test_tokenizer_round_trip_beyond_ascii():
    text = "naïve “quotes” 中文 🙂\ttab"
    tokenizer = data.CharTokenizer.of(text)
    again = data.from_json(tokenizer.to_json())
    assert again.encode(text) == tokenizer.encode(text) and again.decode(again.encode(text)) == text
    assert list(again.chars) == sorted(set(text)) and again.vocab_size == len(set(text))
    assert again.encode("") == [] and again.decode([0, 999]) == again.chars[0] + "\ufffd"


@pytest.mark.parametrize(("prompt", "named"), [("abz", "'z'"), ("a🙂", "'🙂'"), ("\x00", r"'\\x00'")])
def test_unknown_character_is_named(prompt, named):
    with pytest.raises(UserError, match=named):
        data.CharTokenizer.of("abc").encode(prompt)
    with pytest.raises(UserError, match=r"'a'.* 0 characters"):
        data.CharTokenizer("").encode("a")


def test_unknown_tokenizer_kind():
    with pytest.raises(UserError, match="'bpe'"):
        data.from_json({"kind": "bpe"})


def test_batch_is_a_pure_function(shakespeare):
    x, y, documents = shakespeare.batch(3, 1000, 5, 17)
    assert documents is None
    assert x.shape == y.shape == (5, 17) and x.dtype == y.dtype == torch.int64 and x.is_contiguous()
    shakespeare.batch(3, 0, 5, 17)  # what was read before changes nothing
    again = data.load(DataConfig()).batch(3, 1000, 5, 17)
    assert torch.equal(again[0], x) and torch.equal(again[1], y)
    assert torch.equal(x[:, 1:], y[:, :-1])
    for other in (shakespeare.batch(4, 1000, 5, 17), shakespeare.batch(3, 1001, 5, 17)):
        assert not torch.equal(other[0], x)
    nine = torch.cat([shakespeare.batch(3, step, 9, 17).x for step in range(5)])
    assert torch.equal(torch.cat([shakespeare.batch(3, step, 5, 17).x for step in range(9)]), nine)  # one endless order


def test_batch_order_is_pinned(shakespeare):
    """Runs are compared across machines and years: the order of the data must never change."""
    x, *_ = shakespeare.batch(0, 0, 3, 8)
    assert [shakespeare.tokenizer.decode(row.tolist()) for row in x] == ["? Which ", "te:\nIf e", "eak of t"]


def test_batch_covers_every_offset_and_never_leaves_the_training_part():
    corpus = counting(40)
    firsts = torch.cat([corpus.batch(0, step, 8, 6)[0][:, 0] for step in range(60)])
    lasts = torch.cat([corpus.batch(0, step, 8, 6)[1][:, -1] for step in range(60)])
    assert set(firsts.tolist()) == {*range(17)} - {6} and lasts.max() == 19


def test_an_epoch_reads_every_token_once_and_the_next_one_in_other_windows():
    corpus = counting(2 * 230)  # 230 to train on: 22 windows of 10 an epoch
    parts = [corpus.batch(5, step, 4, 10) for step in range(33)]
    x = torch.cat([part.x for part in parts])
    y = torch.cat([part.y for part in parts])
    alone = [corpus.batch(5, sample, 1, 10) for sample in range(132)]
    assert torch.equal(torch.cat([part.x for part in alone]), x) and torch.equal(torch.cat([p.y for p in alone]), y)
    firsts = x[:, 0].tolist()
    for at in range(0, 132, 22):
        short = (y[at : at + 22] < 0).any(1)  # the one that ends where the text does
        assert short.sum() <= 1
        read = x[at : at + 22][y[at : at + 22] >= 0].tolist()
        assert len(set(read)) == len(read) > 210
    real = y >= 0
    assert torch.equal(x[real] + 1, y[real])  # each place has the token after it as its target
    assert torch.equal((x[:, 1:] == x[:, :-1] + 1) | ~real[:, 1:], torch.ones(132, 9, dtype=torch.bool))
    assert not (~real[:, :-1] & real[:, 1:]).any() and not x[~real].any()  # what a short one lacks is at its end
    assert len({min(firsts[at : at + 22]) for at in range(0, 132, 22)}) > 3
    assert len({tuple(firsts[at : at + 22]) for at in (0, 22, 44)}) == 3


@pytest.mark.parametrize("pack", ["stream", "documents"])
@pytest.mark.parametrize("source", ["text", "prepared", "mixture"])
def test_a_text_with_a_period_is_read_from_every_place_of_it(tmp_path, source, pack):
    """Lines of eight, twelve to a context of 96: in training and in validation, whatever the corpus is made of."""
    line = "abcdefg\n"
    (tmp_path / "lines.txt").write_text(line * 6000 + "abc")
    prepare(Recipe(source=f"text:{tmp_path / 'lines.txt'}", tokenizer="byte"), tmp_path / "lines")
    name = {
        "text": f"text:{tmp_path / 'lines.txt'}",
        "prepared": f"prepared:{tmp_path / 'lines'}",
        "mixture": f"0.5*prepared:{tmp_path / 'lines'}+0.5*prepared:{tmp_path / 'lines'}",
    }[source]
    corpus = data.load(DataConfig(source=name, pack=pack))
    shown = [
        corpus.tokenizer.decode([i])
        for i in torch.cat([corpus.batch(3, step, 16, 96).x for step in range(25)])[:, 0].tolist()
    ]
    assert all(30 < shown.count(letter) < 75 for letter in line)
    held_out = [corpus.tokenizer.decode([i]) for i in corpus.windows(120, 96).x[:, 0].tolist()]
    assert all(held_out.count(letter) > 1 for letter in line)


def test_a_number_of_validation_windows_that_divides_the_text_is_no_period():
    text = "0123456789" * 2391  # 23,910 tokens: 239 steps of 100 between 240 windows of 10
    corpus = data.from_text(text, val_fraction=0.999)
    starts = corpus.windows(240, 10).x[:, 0]
    assert torch.bincount(starts, minlength=10).min() > 10


@pytest.mark.parametrize("pack", ["stream", "documents"])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_the_global_batch_does_not_depend_on_who_reads_it(world, pack):
    corpus = data.from_texts([TEXT[i : 3 * i + 40] for i in range(30)], pack=pack)
    for step in (0, 3, 77):
        whole = corpus.batch(1, step, 10, 12)
        parts = [corpus.batch(1, step, 10, 12, rank, world) for rank in range(world)]
        assert {len(part.x) for part in parts} <= {10 // world, -(-10 // world)}
        for one, *others in zip(whole, *parts, strict=True):
            assert one is others[0] is None or torch.equal(torch.cat(others), one)
        halves = [whole.rows(at, at + 5) for at in (0, 5)]
        assert sum(half.counted() for half in halves) == whole.counted() > 0


def test_windows_are_fixed_and_spread_over_the_validation_part():
    corpus = counting(100)
    x, y, _ = corpus.windows(5, 9)
    assert torch.equal(x, corpus.windows(5, 9).x) and torch.equal(x[:, 1:], y[:, :-1])
    ends = np.linspace(50, 91, 6)  # one from each fifth of the places where one may begin
    assert all(a - 1 < first < b for first, a, b in zip(x[:, 0].tolist(), ends[:-1], ends[1:], strict=True))
    assert corpus.windows(1, 49)[0].shape == (1, 49)
    assert corpus.windows(3, 9, "train")[1].max() < 50


def test_text_file_and_folder(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").write_bytes(b"\xff\xff")
    (tmp_path / "b" / "two.txt").write_text("zwei\n")
    (tmp_path / "a.md").write_text("eins")  # no last newline
    (tmp_path / "c.txt").write_bytes("\ufeffdrei\r\n".encode())
    (tmp_path / "empty.txt").touch()
    assert data.read_text(tmp_path) == "eins\nzwei\ndrei\r\n"
    (tmp_path / "c.txt").write_text(TEXT)
    corpus = data.load(DataConfig(source=f"text:{tmp_path / 'c.txt'}", val_fraction=0.25))
    assert (len(corpus.train), len(corpus.val)) == (297, 99)
    assert corpus.tokenizer.decode(ids_of(corpus)) == TEXT


def test_files_are_documents(tmp_path):
    for i, text in enumerate(("one\n", "two and a half\n", "three\n")):
        (tmp_path / f"{i}.txt").write_text(text)
    corpus = data.load(DataConfig(source=f"text:{tmp_path}", val_fraction=0.25))
    assert corpus.train.documents.tolist() == [0, 4] and len(corpus.train) == 18
    assert corpus.val.documents.tolist() == [0, 1]  # the second ends there, one newline later
    ended = data.load(DataConfig(source=f"text:{tmp_path}", tokenizer="byte", val_fraction=0.25))
    assert ended.vocab_size == 257 and [i for i, token in enumerate(ids_of(ended)) if token == 256] == [4, 20, 27]
    assert ended.train.documents.tolist() == [0, 5] and ended.val.documents.tolist() == [0]
    assert ended.tokenizer.decode(ids_of(ended)) == data.read_text(tmp_path)


def test_fingerprint_follows_ids_split_and_characters():
    prints = [
        data.from_text(text, val_fraction=fraction).fingerprint
        for text, fraction in ((TEXT, 0.1), (TEXT, 0.2), (TEXT + "x", 0.1), (TEXT.replace("q", "Q"), 0.1))
    ]
    assert len(set(prints)) == 4 and data.from_text(TEXT).fingerprint == prints[0]
    assert data.from_texts([TEXT[:50], TEXT[50:]]).fingerprint not in prints  # other documents


@pytest.mark.parametrize(
    ("source", "said"),
    [("wikipedia", "'wikipedia'"), ("text:", "'text:'"), ("text:not/there.txt", r"not/there\.txt does not exist")],
)
def test_unknown_source(source, said):
    with pytest.raises(UserError, match=said):
        data.load(DataConfig(source=source))


def test_the_sentence_about_an_unknown_source_is_made_from_the_table(monkeypatch):
    said = (
        "data source 'books' is unknown; allowed are 'shakespeare', 'text:PATH' (a UTF-8 file or a folder of such "
        "files), 'jsonl:PATH#FIELD' (a file of JSON lines, or a folder of them; text without #FIELD), "
        "'parquet:PATH#FIELD' (the same of Parquet files), "
        "'prepared:DIR' (what attnlab prepare made), mixtures such as '0.7*prepared:A+0.3*text:B' and, alone, "
        "'task:NAME'"
    )
    with pytest.raises(UserError) as caught:
        data.load(DataConfig(source="books"))
    assert str(caught.value) == said
    books = SourceKind("books:NAME", lambda config, source: data.from_text(TEXT, source), "of a library")
    monkeypatch.setitem(KINDS, "books", books)
    assert data.load(DataConfig(source="books:one")).source == "books:one"
    with pytest.raises(
        UserError, match=r"'prepared:DIR' \(what attnlab prepare made\), 'books:NAME' \(of a library\), mix"
    ):
        data.load(DataConfig(source="papers:one"))


def test_no_list_of_kinds_that_is_written_by_hand_forgets_one():
    """Help texts are docstrings and fields have comments: neither can be made from the table."""
    mixing = [kind.form for kind in KINDS.values() if kind.mixes]
    alone = [kind.form for kind in KINDS.values() if not kind.mixes]
    for command in (train.train, compare.compare):
        assert [form for form in mixing if form not in command.__doc__] == []
    (comment,) = [line for line in inspect.getsource(DataConfig).splitlines() if line.strip().startswith("source:")]
    for form in (*mixing, *alone):
        assert form in comment


def test_empty_text(tmp_path):
    with pytest.raises(UserError, match=r"0 files"):
        data.read_text(tmp_path)
    (tmp_path / "none.txt").touch()
    for path, said in ((tmp_path, r"1 files, all empty"), (tmp_path / "none.txt", "is empty")):
        with pytest.raises(UserError, match=said):
            data.read_text(path)


def test_not_utf8_says_file_byte_and_line(tmp_path):
    (tmp_path / "good.txt").write_text(TEXT)
    (tmp_path / "latin.txt").write_bytes(b"one\ntwo\ncaf\xe9\n")
    with pytest.raises(UserError, match=r"latin\.txt is not UTF-8: byte 0xe9 at offset 11 \(line 3\)"):
        data.load(DataConfig(source=f"text:{tmp_path}"))


@pytest.mark.parametrize(("fraction", "part"), [(0.1, "validation"), (0.95, "training")])
def test_corpus_shorter_than_a_window(fraction, part):
    corpus = data.from_text(TEXT[:100], "mine", fraction)
    short = min(len(corpus.train), len(corpus.val))
    corpus.check(short - 1)
    for read in (lambda: corpus.batch(0, 0, 1, short), lambda: corpus.windows(1, short), lambda: corpus.check(short)):
        with pytest.raises(UserError, match=rf"the {part} part of 'mine' has {short} tokens.*at most {short - 1}"):
            read()


# -- prepared folders and mixtures -----------------------------------------------------------------------------------


def prepared(folder, texts, val=("and this is held out, all of it",)) -> str:
    """A folder as nanoGPT leaves it, with bytes for tokens and their end-of-document token."""
    folder.mkdir()
    byte = data.tokenizer("byte")
    for split, parts in (("train", texts), ("val", val)):
        ids = [i for text in parts for i in (*byte.encode(text), byte.end)]
        np.array(ids, "<u2").tofile(folder / f"{split}.bin")
    (folder / "tokenizer.json").write_text(json.dumps(byte.to_json()))
    return f"prepared:{folder}"


def test_a_prepared_folder_is_a_corpus(tmp_path):
    source = prepared(tmp_path / "a", ["first document", "the second one"])
    corpus = data.load(DataConfig(source=source))
    assert (corpus.vocab_size, len(corpus.train), corpus.train.documents.tolist()) == (257, 30, [0, 15])
    x, y, _ = corpus.batch(0, 0, 4, 8)
    assert (
        torch.equal(x[:, 1:], y[:, :-1])
        and bytes(corpus.windows(1, 10).x[0].tolist()) in b"and this is held out, all of it"
    )
    assert data.load(DataConfig(source=source, tokenizer="byte")).fingerprint == corpus.fingerprint
    other = prepared(tmp_path / "b", ["first document", "the second two"])
    assert data.load(DataConfig(source=other)).fingerprint != corpus.fingerprint
    with pytest.raises(UserError, match=r"prepared with another tokenizer than data\.tokenizer 'char'"):
        data.load(DataConfig(source=source, tokenizer="char"))
    (tmp_path / "a" / "val.bin").unlink()
    with pytest.raises(UserError, match=r"has no validation part \(it has train\)"):
        data.load(DataConfig(source=source))


def mixture(tmp_path, weights=("0.75", "0.25"), pack="stream") -> data.Corpus:
    texts = {"a": ["a" * 40 + "A" * 21, "a" * 30], "b": ["b" * 9, "bB" * 8, "b" * 50]}
    sources = [prepared(tmp_path / name, texts[name], [name * 40]) for name in texts if not (tmp_path / name).exists()]
    sources = sources or [f"prepared:{tmp_path / name}" for name in texts]
    named = "+".join(f"{weight}*{source}" for weight, source in zip(weights, sources, strict=True))
    return data.load(DataConfig(source=named, pack=pack))


@pytest.mark.parametrize("pack", ["stream", "documents"])
def test_a_mixture_takes_from_each_by_weight(tmp_path, pack):
    corpus = mixture(tmp_path, ("3", "1"), pack)
    rows = torch.cat([corpus.batch(2, step, 8, 12).x for step in range(40)])
    from_b = (rows == ord("b")).any(1)
    assert not ((rows == ord("a")).any(1) & from_b).any() and from_b.sum() == 80  # a quarter of 320
    assert all(abs(int(from_b[at : at + 8].sum()) - 2) <= 1 for at in range(0, 320, 8))
    if pack == "documents":  # whose rows are the same in every epoch: each corpus goes through its own, in order
        epoch = len(packing.row_starts(np.array([0, 10, 27]), 78, 12, 1))
        epochs = [sorted(map(tuple, rows[from_b][at : at + epoch].tolist())) for at in range(0, 5 * epoch, epoch)]
        assert all(each == epochs[0] for each in epochs)
    shown = corpus.windows(16, 12).x
    assert int((shown == ord("b")).any(1).sum()) == 4
    whole = corpus.batch(2, 7, 10, 12)
    for world in (2, 3):
        parts = [corpus.batch(2, 7, 10, 12, rank, world) for rank in range(world)]
        assert torch.equal(torch.cat([part.x for part in parts]), whole.x)


def test_a_mixture_is_its_parts_and_their_weights(tmp_path):
    corpus = mixture(tmp_path)
    one, two = (data.load(DataConfig(source=f"prepared:{tmp_path / name}")) for name in "ab")
    assert ids_of(corpus)[: len(one.train)] == one.train.read(0, len(one.train)).tolist()
    assert len(corpus.train) == len(one.train) + len(two.train) and len(corpus.val) == 82
    assert corpus.train.documents.tolist() == [0, 62, 93, 103, 120]
    assert corpus.fingerprint not in (one.fingerprint, two.fingerprint)
    (tmp_path / "b" / "train.bin").write_bytes((tmp_path / "a" / "train.bin").read_bytes())
    assert mixture(tmp_path).fingerprint != corpus.fingerprint


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("0*shakespeare+1*text:{}", "the weight 0 in the mixture"),
        ("0.5*shakespeare+0.5.1*text:{}", r"the weight 0\.5\.1 in the mixture"),
        ("0.5*shakespeare+0.5*text:{}", "different tokenizers, and a mixture needs one"),
        ("0.5*shakespeare+0.5*books", "data source 'books' is unknown"),
        ("0.5*shakespeare+shakespeare", r"'shakespeare\+shakespeare' is unknown"),
        ("prepared:nowhere", "nowhere does not exist, so it is not a prepared corpus"),
    ],
)
def test_a_mixture_that_cannot_be(tmp_path, source, said):
    (tmp_path / "a+b.txt").write_text(TEXT)
    with pytest.raises(UserError, match=said):
        data.load(DataConfig(source=source.format(tmp_path / "a+b.txt")))
    assert len(data.load(DataConfig(source=f"text:{tmp_path / 'a+b.txt'}")).train) == 356  # a plus is only a plus


def test_a_split_with_nothing_in_it(tmp_path):
    source = prepared(tmp_path / "a", ["some text"], val=())
    for pack in ("stream", "documents"):
        with pytest.raises(UserError, match=r"the validation part of .* has 0 tokens and nothing to predict"):
            data.load(DataConfig(source=source, pack=pack)).check(4)
    with pytest.raises(UserError, match=r"data.pack 'docs'.*stream, documents"):
        DataConfig(pack="docs")  # type: ignore[arg-type]


@pytest.mark.parametrize("end", [True, False])
def test_what_prepare_made_is_trained_on_document_by_document(tmp_path, end):
    stories = [f"story {n}: {'mice and cats ' * (n % 7)}end" for n in range(40)]
    (tmp_path / "stories.txt").write_text("\n".join(stories) + "\n")
    recipe = Recipe(
        source=f"text:{tmp_path / 'stories.txt'}", documents="line", tokenizer="byte", val_fraction=0.2, end=end
    )
    prepare(recipe, tmp_path / "stories")
    config = DataConfig(source=f"prepared:{tmp_path / 'stories'}", pack="documents")
    corpus, byte, found = data.load(config), data.tokenizer("byte"), set()
    for step in range(40):
        x, y, documents = corpus.batch(0, step, 4, 128)
        for row in range(4):
            for number in set(documents[row].tolist()) - {-1}:
                own = documents[row] == number
                whole = [*x[row, own].tolist(), y[row, own][-1].item()]
                assert whole[1:] == y[row, own].tolist()
                found.add((whole[0] == byte.end, whole[-1] == byte.end, byte.decode(whole)))
    first, *others = [f"{story}\n" for story in stories[:32]]
    assert found == {(False, end, first), *((end, end, story) for story in others)}

    shard = tmp_path / "stories" / "train-00000.bin"
    shard.write_bytes(bytes(shard.stat().st_size))  # it is known by its checksums: no token is read to tell
    assert data.load(config).fingerprint == corpus.fingerprint


RECORDS = ["the quick brown fox", "jumps over the lazy dog", ""]


def test_records_are_read_as_prepare_reads_them(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": each, "other": "x"}) + "\n" for each in RECORDS))
    tokenizer = ByteTokenizer()
    wanted = data.from_texts(RECORDS[:2], tokenizer=tokenizer)
    found = data.load(DataConfig(source=f"jsonl:{tmp_path / 'a.jsonl'}", tokenizer="byte"))
    assert torch.equal(found.train.read(0, len(found.train)), wanted.train.read(0, len(wanted.train)))
    assert data.load(DataConfig(source=f"jsonl:{tmp_path}#other")).tokenizer.vocab_size == 1
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed: pip install 'attnlab[data]'")
    table = pytest.importorskip("pyarrow").table({"text": RECORDS})
    parquet.write_table(table, tmp_path / "a.parquet")
    again = data.load(DataConfig(source=f"parquet:{tmp_path / 'a.parquet'}", tokenizer="byte"))
    assert again.fingerprint == found.fingerprint
    for source, said in {
        "jsonl:": "is unknown",
        f"jsonl:{tmp_path}/none.jsonl": "does not exist",
        f"jsonl:{tmp_path / 'a.jsonl'}#body": "has no field 'body'; it has text, other",
    }.items():
        with pytest.raises(UserError, match=said):
            data.load(DataConfig(source=source))
    (tmp_path / "empty.jsonl").write_text(json.dumps({"text": ""}))
    with pytest.raises(UserError, match="has no text in it"):
        data.load(DataConfig(source=f"jsonl:{tmp_path / 'empty.jsonl'}"))
