"""Small runs, models and corpora for tests of every room: a second or less on one core."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

from attnlab.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from attnlab.model import Decoder

PANGRAM = "the quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs\n"
HAMLET = ("to", "be", "or", "not", "that", "is", "the", "question")


def tiny_model(**fields: Any) -> ModelConfig:
    """Return the config of a model with 2 layers, 16 wide, 2 heads and a context of 16; `fields` change it."""
    return ModelConfig(**{"context": 16, "n_layers": 2, "d_model": 16, "n_heads": 2, **fields})


def tiny_training(**fields: Any) -> TrainConfig:
    """Return how such a model is trained: a few steps of 2 sequences in float32 on the CPU; `fields` change it."""
    few = {"steps": 12, "batch_size": 2, "warmup": 2, "eval_batches": 2, "precision": "fp32", "device": "cpu"}
    return TrainConfig(**{**few, **fields})


def tiny_corpus(folder: Path, text: str = 12 * PANGRAM) -> DataConfig:
    """Write `text` into `folder` and return it as a corpus of characters."""
    (folder / "text.txt").write_text(text)
    return DataConfig(source=f"text:{folder / 'text.txt'}")


def random_words(count: int = 2000) -> str:
    """Return `count` words of eight, always the same ones, in random order."""
    draw = random.Random(3)
    return " ".join(draw.choice(HAMLET) for _ in range(count))


def tiny_run(
    folder: Path, *, text: str = 12 * PANGRAM, model: ModelConfig, train: TrainConfig, **fields: Any
) -> RunConfig:
    """Return a run of `model` on `text`, which is written into `folder`."""
    return RunConfig(**{"name": "tiny", "model": model, "data": tiny_corpus(folder, text), "train": train, **fields})


CONVERTED = ModelConfig(vocab_size=29, context=21, n_layers=2, d_model=24, n_heads=4, head_dim=6)  # in tests of convert


def grown(config: ModelConfig, seed: int = 0) -> Decoder:
    """Return a random model in float64 whose norms and biases matter."""
    torch.manual_seed(seed)
    model = Decoder(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def batches(count: int = 3, seed: int = 1) -> list[torch.Tensor]:
    """Return batches of random tokens for a model of the shape `CONVERTED`."""
    numbers = torch.Generator().manual_seed(seed)
    return [torch.randint(CONVERTED.vocab_size, (3, CONVERTED.context), generator=numbers) for _ in range(count)]
