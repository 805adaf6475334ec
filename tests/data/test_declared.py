"""The tokens that end a text, wherever a folder declares them, and what becomes of them on the way."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attnlab import data, pretrained
from attnlab.config import DataConfig, ModelConfig
from attnlab.data.prepare import Recipe, prepare
from attnlab.data.shards import Prepared
from attnlab.errors import UserError
from attnlab.inference import text as inference
from attnlab.inference.generate import Sampling
from attnlab.model import Decoder

SPECIAL = ["[PAD]", "[BOS]", "[STOP]", "[END]"]


def tokenizer_json(folder: Path, special: bool = True) -> Path:
    """A byte-level tokenizer whose special tokens have names of its own; not `special`: they are plain pieces."""
    pytest.importorskip("tokenizers", reason="tokenizers is not installed: pip install 'attnlab[data]'")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, special_tokens=SPECIAL, initial_alphabet=letters, show_progress=False)
    made.train_from_iterator(["one tale, and then another tale of the same kind"], trainer)
    folder.mkdir(exist_ok=True)
    held = json.loads(made.to_str())
    if not special:
        held["added_tokens"] = []
    (folder / "tokenizer.json").write_text(json.dumps(held))
    return folder


def write(folder: Path, **files: Any) -> None:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize(
    "files, ends",
    [
        ({"tokenizer_config": {"eos_token": "[END]", "bos_token": "[BOS]"}}, (3,)),
        ({"tokenizer_config": {"eos_token": {"content": "[STOP]", "lstrip": False}}}, (2,)),
        ({"special_tokens_map": {"eos_token": "[END]"}}, (3,)),
        ({"special_tokens_map": {"eos_token": {"content": "[END]"}}, "tokenizer_config": {"eos_token": None}}, (3,)),
        ({"generation_config": {"eos_token_id": [2, 3]}}, (2, 3)),
        ({"config": {"eos_token_id": 3}}, (3,)),
        ({"generation_config": {"eos_token_id": [2, 0]}, "tokenizer_config": {"eos_token": "[END]"}}, (3, 2, 0)),
        ({"tokenizer_config": {"eos_token": "[NOT THERE]"}, "config": {"eos_token_id": 3}}, (3,)),
        ({"config": {"eos_token_id": 9999}}, ()),
        ({"tokenizer_config": {"pad_token": "[PAD]"}}, ()),
        ({}, ()),
    ],
)
def test_every_file_that_declares_an_end_is_read(tmp_path, files, ends, special):
    folder = tokenizer_json(tmp_path / "tok", special)
    write(folder, **files)
    for made in (data.tokenizer(folder), data.tokenizer(folder / "tokenizer.json")):
        assert made.ends == ends and made.end == (ends[0] if ends else None)
        again = data.from_json(made.to_json())  # as it travels with a run
        assert again.ends == ends and again.fingerprint == made.fingerprint
        assert not {2, 3} & {*ends} & {*made.encode("the [END] of a [STOP]")}  # in text, a name is text
        assert made.decode([*made.encode("a tale"), *ends]) == "a tale"


def test_documents_are_ended_as_declared_and_the_manifest_says_so(tmp_path, capsys):
    folder = tokenizer_json(tmp_path / "tok")
    write(folder, tokenizer_config={"eos_token": "[END]"})
    (tmp_path / "tales.jsonl").write_text("".join(json.dumps({"text": f"tale {i}"}) + "\n" for i in range(7)))
    recipe = Recipe(source=f"jsonl:{tmp_path / 'tales.jsonl'}", tokenizer=str(folder))
    held = prepare(recipe, tmp_path / "out")
    assert held.manifest["tokenizer"]["end"] == 3 and held.tokenizer.ends == (3,)
    ids = held.split("train").read(0, len(held.split("train"))).numpy()
    starts = held.split("train").documents
    assert (ids[starts[1:] - 1] == 3).all() and ids[-1] == 3 and (ids == 3).sum() == len(starts) == 6
    corpus = data.load(DataConfig(source=f"prepared:{tmp_path / 'out'}", pack="documents"))
    assert len(corpus.row_starts("train", 12)) > 0 and corpus.tokenizer.end == 3
    tokenizers = pytest.importorskip("tokenizers")
    assert tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")).get_vocab_size() >= 260
    write(folder, tokenizer_config={"eos_token": "[STOP]"})
    with pytest.raises(UserError, match="another tokenizer than"):
        prepare(recipe, tmp_path / "out")


def test_a_text_stops_at_every_declared_token_and_an_export_keeps_them(tmp_path):
    folder = tokenizer_json(tmp_path / "model")
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=290, n_layers=1, d_model=16, n_heads=2, context=32)
    made = pretrained.Loaded(Decoder(config).eval(), data.tokenizer(folder), "new", "run")
    pretrained.save(made, tmp_path / "plain")
    assert "eos_token" not in json.loads((tmp_path / "plain" / "tokenizer_config.json").read_text())
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((tmp_path / "plain" / name).read_bytes())
    write(folder, generation_config={"eos_token_id": [2, 7]}, special_tokens_map={"eos_token": {"content": "[END]"}})
    loaded = pretrained.load(folder)
    assert set(inference.ends(loaded, loaded.tokenizer)) == {2, 3, 7} and loaded.tokenizer.end == 3
    out = pretrained.save(loaded, tmp_path / "again")
    again = pretrained.load(out)
    assert set(inference.ends(again, again.tokenizer)) == {2, 3, 7} and again.tokenizer.end == 3
    config = json.loads((out / "tokenizer_config.json").read_text())
    assert config["eos_token"] in ("[END]", {"content": "[END]"})
    likeliest = torch.nn.functional.one_hot(torch.tensor(7), 290).float()
    again.model.head.forward = lambda x: likeliest.expand(*x.shape[:-1], 290)
    found = inference.continue_texts(again, ["tale"], Sampling(20, 0.0))
    assert found.tokens == 1 and found.texts == [""]


def test_a_chat_template_gets_the_declared_names(tmp_path):
    folder = tokenizer_json(tmp_path / "tok")
    write(folder, tokenizer_config={"eos_token": "[END]", "bos_token": {"content": "[BOS]"}})
    config = ModelConfig(vocab_size=290, n_layers=1, d_model=16, n_heads=2, context=32)
    about = {
        "tokenizer_config": json.loads((folder / "tokenizer_config.json").read_text()),
        "chat_template": "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}|{{ pad_token }}",
        "config": {"pad_token_id": 0},
    }
    tokenizer = data.tokenizer(folder)
    loaded = pretrained.Loaded(Decoder(config).eval(), tokenizer, "here", "run", about)
    assert inference.in_chat(loaded, "hi", None) == [1, *tokenizer.encode("hi"), 3, *tokenizer.encode("|"), 0]


def text_of(held: Prepared, split: str = "train") -> list[str]:
    tokens = held.split(split)
    edges = [*tokens.documents.tolist(), len(tokens)]
    return [held.tokenizer.decode(tokens.read(a, b).tolist()) for a, b in pairwise(edges)]


@pytest.mark.parametrize(
    "delimiter, text, documents",
    [
        ("<|sep|>", "one<|sep|>two\nlines<|sep|><|sep|>three", ["one", "two\nlines", "three"]),
        ("<|sep|>", "\n<|sep|>\none\n<|sep|>\ntwo\n<|sep|>\n", ["\none\n", "\ntwo\n"]),
        (r"\n---\n", "one\n---\ntwo --- still\n---\nthree\n", ["one", "two --- still", "three\n"]),
        ("%", "50%60%70", ["50", "60", "70"]),
        ("STOP", "go STOP go STOP no", ["go ", " go ", " no"]),
        ("aXa", "1aXaXa2aXa3", ["1", "Xa2", "3"]),
    ],
)
@pytest.mark.parametrize("block", [3, 1 << 20])
def test_documents_between_delimiters(tmp_path, monkeypatch, delimiter, text, documents, block):
    monkeypatch.setattr("attnlab.data.sources.BLOCK", block)
    monkeypatch.setattr("attnlab.data.document_rules.LONGEST", block)
    (tmp_path / "text.txt").write_text(text)
    (tmp_path / "val.txt").write_text("held out")
    recipe = Recipe(
        source=f"text:{tmp_path / 'text.txt'}",
        val=f"text:{tmp_path / 'val.txt'}",
        documents=delimiter,
        tokenizer="byte",
    )
    assert text_of(prepare(recipe, tmp_path / "out")) == documents


def test_a_rule_that_is_none_and_a_delimiter_that_is_nowhere(tmp_path):
    (tmp_path / "text.txt").write_text("one two three\n" * 9)
    source = f"text:{tmp_path / 'text.txt'}"
    for rule, said in (("lines", "did you mean 'line'"), ("", "unknown rule"), ("<|sep|>", "is nowhere in")):
        with pytest.raises(UserError, match=said):
            prepare(Recipe(source=source, documents=rule, tokenizer="byte"), tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["text.txt"]


# text that a tokenizer does not know


def words_json(folder: Path, kind: str) -> Path:
    """A tokenizer that knows small letters and spaces: what else there is becomes <unk>, or nothing."""
    pytest.importorskip("tokenizers", reason="tokenizers is not installed: pip install 'attnlab[data]'")
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    special = ["<unk>", "</s>"]
    text = ["a cat met the mouse and the dog"] * 4
    if kind == "bytes":  # a byte-level one that lacks bytes
        made, trainer = Tokenizer(models.BPE()), trainers.BpeTrainer(special_tokens=special[1:], show_progress=False)
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    else:
        made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=kind == "fused"))
        trainer = trainers.BpeTrainer(special_tokens=special, show_progress=False)
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        if kind == "stripped":
            made.normalizer = normalizers.Replace("ö", "")
    made.train_from_iterator(text, trainer)
    folder.mkdir(exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    return folder


LINES = [f"the cat met {'öÖ🐭'[: n % 4]} the mouse" for n in range(24)]
LOST = [n % 4 for n in range(24)]


def bytes_of(lines: list[str]) -> int:
    return len("".join(lines).encode())


@pytest.mark.parametrize("kind", ["unk", "fused", "bytes", "stripped"])
@pytest.mark.parametrize("workers", [1, 3])
def test_what_a_tokenizer_does_not_know_is_counted(tmp_path, kind, workers, monkeypatch):
    monkeypatch.setattr("attnlab.data.encoding.UNIT", 100)
    folder = words_json(tmp_path / "tok", kind)
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES))
    source = f"jsonl:{tmp_path / 'text.jsonl'}"
    held = prepare(Recipe(source=source, tokenizer=str(folder), val_fraction=0.25), tmp_path / "out", workers=workers)
    for name, lines, lost in (("train", LINES[:18], LOST[:18]), ("val", LINES[18:], LOST[18:])):
        split = held.manifest["splits"][name]
        want = {"bytes": bytes_of(lines), "characters": len("".join(lines)), "unknown": sum(lost)}
        assert split["text"] == want and set(split["unknown"]) == set("öÖ🐭")
        assert held.split(name).text_bytes == want["bytes"]
        rows = np.fromfile(tmp_path / "out" / f"{name}.text.bin", "<i8").reshape(-1, 3)
        assert rows[:, 2].tolist() == np.cumsum([0, *lost[:-1]]).tolist()
    held.verify()
    few = Recipe(source=source, tokenizer=str(folder), val=source, max_tokens=40)
    cut = prepare(few, tmp_path / "few", workers=workers).manifest["splits"]["train"]
    assert cut["text"]["bytes"] == bytes_of(LINES[: cut["documents"]]) and cut["documents"] < 18
    (tmp_path / "out" / "val.text.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"val\.text\.bin has 0 bytes"):
        Prepared.open(tmp_path / "out")


def test_of_one_document_that_is_cut_the_bytes_are_not_known(tmp_path):
    (tmp_path / "text.txt").write_text("\n".join(LINES))
    folder = words_json(tmp_path / "tok", "unk")
    held = prepare(Recipe(source=f"text:{tmp_path / 'text.txt'}", tokenizer=str(folder)), tmp_path / "out")
    assert held.manifest["splits"]["val"]["text"] is None and held.split("val").text_bytes == -1
    mixed = data.load(DataConfig(source=f"0.5*prepared:{tmp_path / 'out'}+0.5*prepared:{tmp_path / 'out'}"))
    assert mixed.val.text_bytes == -1


def test_a_text_file_in_two_parts_keeps_its_bytes(tmp_path):
    (tmp_path / "text.txt").write_text("\n".join(LINES))
    folder = words_json(tmp_path / "tok", "unk")
    corpus = data.load(DataConfig(source=f"text:{tmp_path / 'text.txt'}", tokenizer=str(folder), val_fraction=0.3))
    assert corpus.train.text_bytes + corpus.val.text_bytes == bytes_of(["\n".join(LINES)])
    told = corpus.val.text_bytes / (corpus.train.text_bytes + corpus.val.text_bytes)
    assert abs(told - 0.3) < 0.03
    byte = data.load(DataConfig(source=f"text:{tmp_path / 'text.txt'}", tokenizer="byte"))
    assert byte.val.text_bytes is None  # its ids say it


def test_prepare_tells_what_is_lost(tmp_path, capsys):
    from attnlab.cli.main import main

    (tmp_path / "text.txt").write_text("\n".join(LINES))
    (tmp_path / "held.txt").write_text("a cat met a mouse\na Ж\n")
    folder = words_json(tmp_path / "tok", "unk")
    words = ["prepare", f"text:{tmp_path / 'text.txt'}", "--documents", "line", "--tokenizer", str(folder)]
    assert main([*words, "--val", f"text:{tmp_path / 'held.txt'}", "--out", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert "val: the tokenizer does not know 3 of 22 characters (13.64%), such as '\\nЖ'" in told
    assert f"train: the tokenizer does not know {sum(LOST) + 23} of " in told
    assert main([*words[:4], "--tokenizer", "byte", "--out", str(tmp_path / "bytes")]) == 0
    assert "does not know" not in capsys.readouterr().out
