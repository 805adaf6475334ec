"""Folders of patched models: `attnlab patch` reads a model of transformers, patches it and writes it atomically."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.utils import logging

from .. import attention
from ..config import from_dict
from ..errors import UserError, choose
from ..files import check_free, expanded, whole_folder
from ..laws.subject import ranges
from ..pretrained import folders
from ..pretrained.model_card import FRONT, cell
from ..results import Tell
from ..runs.tensors import finite_weights
from .hosts import MODELS
from .patch import Counts, patch

CLASSES: list[Any] = [*(cls.__bases__[-1] for cls in MODELS), *MODELS]
TYPES = [cls.config_class.model_type for cls in CLASSES]  # model_type of each; those of transformers first
COPIED = ("tokenizer*", "special_tokens_map.json", "vocab.json", "merges.txt", "chat_template.jinja")


def dry_run(source: str, **settings: Any) -> Counts:
    """Return the counts of `patch`, from shapes alone: nothing is downloaded, and no weight is made.

    `source`: a folder, or a model type such as gpt2, for its default shape. `settings` are those of `patch`.
    """
    folder = expanded(source)
    if folder.is_dir():
        config = read_patched(folder)
    else:
        config = AutoConfig.for_model(choose("folder or model type", source, TYPES[: len(MODELS)]))
    with theirs(folder), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return patch(model, **settings)


def patch_folder(source: str, out: str | Path, *, progress: Tell, **settings: Any) -> Counts:
    """Patch the model in a folder or on the Hugging Face hub, and write it to `out` with its tokenizer.

    Return the counts. `settings` are those of `patch`. Raises `UserError` for a model that cannot be opened or patched,
    and where `out` is not empty.
    """
    out = expanded(out)
    folder = expanded(source)
    check_free(out)
    folder = folder if folder.is_dir() else folders.download(source)
    progress(f"reading {source}", 0, 3)
    model = load_patched(folder)
    progress("patching, and asking the laws", 1, 3)
    counts = patch(model, **settings)
    progress(f"writing {out}", 2, 3)
    with whole_folder(out) as half:
        with folders.tensor_errors():
            model.save_pretrained(half)
        for pattern in COPIED:
            for file in folder.glob(pattern):
                shutil.copy(file, half)
        (half / "README.md").write_text(patch_card(model, folder.name, counts), "utf-8")
    return counts


def read_patched(folder: Path) -> PretrainedConfig:
    """Return the config of the model in `folder`. Raises `UserError` for a type that cannot be patched."""
    kind = folders.describe(folder)["config"].get("model_type")
    choose(f"model_type in {folder}:", str(kind), TYPES)
    with theirs(folder):
        return AutoConfig.from_pretrained(folder)


def load_patched(folder: Path) -> Any:
    """Return the model in `folder`. Raises `UserError` where a tensor is missing or damaged."""
    config = read_patched(folder)
    check_stored(folder, config)
    with theirs(folder):
        found: Any = AutoModelForCausalLM.from_pretrained(folder, config=config, output_loading_info=True)
    model, info = found
    refuse_missing(folder, sorted(info["missing_keys"]))
    for name, tensor in model.named_parameters():
        finite_weights(name, tensor, folder)
    return model.eval()


@contextmanager
def theirs(folder: Path) -> Iterator[None]:
    """Raise `UserError` in place of any error of transformers, which has many kinds, while it reads `folder`."""
    loud = logging.get_verbosity()
    logging.set_verbosity_error()  # what is wrong is said in one sentence, and not in a table besides
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong is said below
            yield
    except UserError:
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise UserError(
            f"{folder} does not hold a model that transformers takes ({lines[-1]}): mend its config.json, or take "
            "the one that came with the weights"
        ) from None
    finally:
        logging.set_verbosity(loud)


def refuse_missing(folder: Path, missing: list[str]) -> None:
    """Raise `UserError` where tensors are missing."""
    if missing:
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise UserError(f"{folder} lacks the tensor {missing[0]}{more}; its weights do not belong to its config.json")


def check_stored(folder: Path, config: PretrainedConfig) -> None:
    """Raise `UserError` where a tensor of `folder` is missing, or of another shape or kind than `config` says.

    It is asked before transformers reads them, which converts some and names others in a table.
    """
    for index in folder.glob("*.index.json"):
        folders.indexed(index)
    if not any((folder / f"model.safetensors{end}").is_file() for end in ("", ".index.json")):
        return
    with theirs(folder), torch.device("meta"):
        empty: Any = AutoModelForCausalLM.from_config(config)
    wanted = dict(empty.named_parameters())
    found = folders.tensors(folder)
    prefix = f"{empty.base_model_prefix}."
    missing = [name for name in wanted if not {name, name.removeprefix(prefix)} & set(found)]
    refuse_missing(folder, [name for name in missing if not (config.tie_word_embeddings and "lm_head" in name)])
    for name, held in found.items():
        own = wanted.get(name, wanted.get(f"{prefix}{name}"))
        if own is not None and tuple(own.shape) != held.shape:
            raise UserError(
                f"{folder} does not hold the weights that its config.json describes: {name} has the shape "
                f"{[*held.shape]}, and {[*own.shape]} is asked for; bring the two files of one model"
            )
        if own is not None and not held.floating:
            raise UserError(
                f"{folder} has {name} in whole numbers, and weights are floating-point numbers: bring it as float32"
            )


def patch_card(model: Any, source: str, counts: Counts) -> str:
    """Return README.md of a patched model; `source` is the name of the original."""
    configs = [from_dict(attention.module(e["mechanism"]).Config, e["config"]) for e in model.config.attnlab]
    rows = [(e["mechanism"], ranges(e["layers"]), c) for e, c in zip(model.config.attnlab, configs, strict=True)]
    floats = sum(a.mechanism.config.cache_spec.per_token for a in model.adapters().values())
    lines = [
        *FRONT,
        f"# {source} with {'+'.join(dict.fromkeys(name for name, _, _ in rows))} attention",
        "",
        f"Made from {source} by attnlab patch.",
        "",
        "| mechanism | layers | formula | remembers | source |",
        "| --- | --- | --- | --- | --- |",
        *(f"| {name} | {at} | `{cell(c.formula)}` | {c.caches} | {c.source} |" for name, at, c in rows),
        "",
        f"Cache of these layers per further token: {floats:,.0f} floats. Parameters that train: {counts}.",
        "",
        "```python",
        "import attnlab.hf",
        "from transformers import AutoModelForCausalLM",
        "",
        'model = AutoModelForCausalLM.from_pretrained("this folder")',
        "```",
        "",
    ]
    return "\n".join(lines)
