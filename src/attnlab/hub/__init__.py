"""One door to trained models, whatever wrote them: run folders, exported folders, Hugging Face folders and hub names,
nanoGPT's ckpt.pt. Reading and writing need JSON and safetensors alone; no foreign code runs, and nothing is unpickled.

A family is a file in `families/`: which `model_type` it reads, the config in both directions, and one table of tensor
names (see `table.py`).
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from .. import data
from ..checkpoint import RunFolder, load_model
from ..config import ModelConfig, to_dict
from ..model import Decoder
from ..spec import UserError, choose
from . import card, families, files, table

RUN = "run"  # the family of a run folder
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")  # what a config says beyond the model's shape


@dataclass(frozen=True)
class Loaded:
    """A trained model, and what is needed to write it back."""

    model: Decoder  # in evaluation mode
    tokenizer: data.Tokenizer | None
    source: str  # as the user named it
    family: str  # "run", or the name of a file in `families/`
    about: Mapping[str, Any] = field(default_factory=dict)  # "config": the source's; "step", "results", "chat_template"


def names() -> list[str]:
    """The families, in alphabetical order."""
    return sorted(m.name for m in pkgutil.iter_modules(families.__path__))


def module(name: str) -> ModuleType:
    """`families/<name>.py`."""
    return importlib.import_module(f"{families.__name__}.{choose('family', name, names())}")


def load(
    source: str | Path,
    *,
    checkpoint: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    trust: bool = False,
) -> Loaded:
    """The model that `source` names: a folder, a file ckpt.pt, or a name on the Hugging Face hub.

    `checkpoint` is a step of a run folder (None: the newest). `trust` lets a pickle run the code it brings. Raises
    `UserError` for a type of model that no family reads, and for tensors that are missing, left over or misshapen.
    """
    path = Path(source).expanduser()
    if (path / "run.json").is_file():
        return _load_run(path, str(source), checkpoint, dtype, device)
    if checkpoint is not None:
        raise UserError(f"{source} is not a run folder, so it has no checkpoint {checkpoint}; leave the checkpoint out")
    path = path if path.is_dir() else files.download(str(source))
    about = files.about(path)
    known = {kind: name for name in names() for kind in module(name).MODEL_TYPES}
    family = known[choose(f"model type in {path / 'config.json'}:", str(about["config"].get("model_type")), known)]
    model = build(module(family), about["config"], files.tensors(path, trust), str(source), dtype)
    return Loaded(model.to(device), files.tokenizer(path), str(source), family, about)


def _load_run(path: Path, source: str, step: int | None, dtype: torch.dtype, device: str | torch.device) -> Loaded:
    folder = RunFolder.open(path)
    model, config = load_model(path, step, device)
    result = folder.result()
    about = {"config": to_dict(config), "step": folder.newest() if step is None else step}
    if result is not None:
        about["results"] = {"validation loss, nats per token": result.val_loss, "training tokens": result.tokens}
    return Loaded(model.to(dtype), folder.tokenizer(), source, RUN, about)


def build(
    family: ModuleType, hf: Mapping[str, Any], found: Mapping[str, files.Stored], source: str, dtype: torch.dtype
) -> Decoder:
    """The Decoder of a family's config and tensors, in evaluation mode."""
    model = empty(family.to_model_config(hf))
    rows = list(family.table(model))
    stored = table.check(table.expected(rows, table.ours(model)), found, family, source)
    model.load_state_dict(table.read(rows, stored, dtype), strict=False, assign=True)
    if model.config.tied:
        model.head.weight = model.embed.weight
    return model.eval()


def empty(config: ModelConfig) -> Decoder:
    """A Decoder whose tensors have shapes and no values."""
    with torch.device("meta"):
        return Decoder(config)


def save(
    loaded: Loaded, folder: str | Path, *, family: str = "attnlab", results: Mapping[str, Any] | None = None
) -> Path:
    """Write the model as `family` does: safetensors, config.json, the tokenizer's files and a model card, whole or not
    at all. transformers reads what is written for a family of its own. Raises `UserError` where the family cannot
    express the model, saying which fields differ, and where `folder` holds something already."""
    theirs, config = module(family), loaded.model.config
    hf = {**theirs.from_model_config(config), **_tokens(loaded), "dtype": _name(loaded.model)}
    state = table.write(theirs.table(empty(config)), table.ours(loaded.model))
    results = loaded.about.get("results") if results is None else results
    source = Path(loaded.source)
    text = card.card(loaded.model, family, source.name if source.exists() else loaded.source, results)
    return files.write(Path(folder).expanduser(), hf, state, text, loaded.tokenizer, loaded.about.get("chat_template"))


def _name(model: Decoder) -> str:
    return str(model.embed.weight.dtype).removeprefix("torch.")


def _tokens(loaded: Loaded) -> dict[str, Any]:
    """Which tokens begin, end and fill a text: as the source said, else the tokenizer's own end."""
    end = loaded.tokenizer.end if loaded.tokenizer is not None else None
    said = loaded.about.get("config", {})
    return {name: said.get(name, default) for name, default in zip(TOKENS, (end, end, None), strict=True)}
