"""Weights in forms that are not read: whole numbers, 8 bits, GGUF, and families that are not there."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from attnlab import pretrained
from attnlab.config import ModelConfig
from attnlab.errors import UserError, choose
from attnlab.model import Decoder

NAME = "model.layers.0.attention.qkv.weight"
CONFIG = ModelConfig(vocab_size=31, context=8, n_layers=1, d_model=16, n_heads=2)


@pytest.fixture
def folder(tmp_path):
    return pretrained.save(pretrained.Loaded(Decoder(CONFIG), None, "here", "attnlab"), tmp_path / "model")


@pytest.mark.parametrize("name", [NAME, "model.norm.weight", "model.embed.weight"])
@pytest.mark.parametrize("kind", ["int8", "uint8", "bool", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("pickled", [False, True])
def test_weights_of_eight_bits_are_refused(folder, kind, name, pickled):
    weights = load_file(folder / "model.safetensors")
    weights[name] = weights[name].to(getattr(torch, kind))
    if pickled:
        (folder / "model.safetensors").unlink()
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=rf"has {name} in {kind}.*bring it as float32"):
        pretrained.load(folder)


@pytest.mark.parametrize("trust", [False, True])
def test_files_of_other_forms_are_named(tmp_path, folder, trust):
    (tmp_path / "a.gguf").write_bytes(b"GGUF\x03\0\0\0" + bytes(99))
    (tmp_path / "b.bin").write_bytes(b"GGUF\x03\0\0\0" + bytes(99))
    for name in ("a.gguf", "b.bin"):
        with pytest.raises(UserError, match=f"{name} is a GGUF file, which is not read here: give the folder"):
            pretrained.load(tmp_path / name, trust=trust)
    with pytest.raises(UserError, match=r"holds a\.gguf, a GGUF file, which is not read here"):
        pretrained.load(tmp_path, trust=trust)
    with pytest.raises(UserError, match=r"holds tensors without a config\.json: give the folder that has both"):
        pretrained.load(folder / "model.safetensors", trust=trust)


@pytest.mark.parametrize(
    ("kind", "near"),
    [
        ("opt", None),
        ("gptneo", None),
        ("bert", None),
        ("bloom", None),
        ("gpt_neox", None),
        ("qwen2_moe", None),
        ("llama4_text", None),
        ("lama", "llama"),
        ("gtp2", "gpt2"),
        ("deepseek_v", "deepseek_v"),
    ],
)
def test_a_hint_names_what_is_near(folder, kind, near):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": kind}))
    with pytest.raises(UserError, match=f"unknown model_type .*'{kind}'") as refused:
        pretrained.load(folder)
    hint = str(refused.value).partition("did you mean ")[2]
    assert (near is None and not hint) or (near is not None and hint.startswith(f"'{near}"))


@pytest.mark.parametrize("given", ["", "x", "x" * 200, "published", "mlaa", "kv_rnk"])
def test_hints_are_slips_or_beginnings(given):
    with pytest.raises(UserError) as refused:
        choose("word", given, ["published-msla", "mla", "kv_rank"])
    wanted = {"published": "published-msla", "mlaa": "mla", "kv_rnk": "kv_rank"}.get(given)
    assert ("did you mean" in str(refused.value)) == (wanted is not None)
    assert wanted is None or f"did you mean {wanted!r}?" in str(refused.value)
