"""Models of other libraries, read and written: their own code is the witness."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from attnlab import data, hub
from attnlab.config import ModelConfig
from attnlab.model import Decoder

SMALL = ModelConfig(vocab_size=41, context=48, n_layers=2, d_model=32, n_heads=4)


def loaded(config: ModelConfig) -> hub.Loaded:
    torch.manual_seed(0)
    return hub.Loaded(Decoder(config).eval(), data.CharTokenizer("abc"), "made here", "run", {})


@pytest.mark.parametrize("tied", [True, False])
def test_an_exported_folder_is_the_model(tied: bool, tmp_path: Path) -> None:
    given = loaded(ModelConfig(mechanisms=("mla", "msla", "mha"), n_layers=3, tied=tied))
    folder = hub.save(given, tmp_path / "out")
    again = hub.load(folder)
    assert (again.family, again.model.config) == ("attnlab", given.model.config)
    assert again.tokenizer is not None and again.tokenizer.to_json() == given.tokenizer.to_json()  # type: ignore[union-attr]
    assert not again.model.training
    tokens = torch.randint(41, (2, 20))
    assert torch.equal(again.model(tokens)[0], given.model(tokens)[0])
    assert all(p.requires_grad for p in again.model.parameters())
    assert sorted(f.name for f in folder.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
