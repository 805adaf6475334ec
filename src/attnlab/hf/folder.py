"""`attnlab patch`: a model of transformers is opened, patched, and written whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from .. import attention
from ..config import from_dict
from ..errors import UserError, choose
from ..laws.subject import ranges
from ..pretrained import folders
from ..pretrained.model_card import FRONT, cell
from .hosts import MODELS
from .patch import Counts, patch

CLASSES: list[Any] = [*(cls.__bases__[-1] for cls in MODELS), *MODELS]
TYPES = [cls.config_class.model_type for cls in CLASSES]  # those of transformers first
BESIDE = ("tokenizer*", "special_tokens_map.json", "vocab.json", "merges.txt", "chat_template.jinja")


def dry_run(source: str, **settings: Any) -> Counts:
    """`patch` on shapes alone: a folder, or the name of a model type, such as gpt2, for its default shape. Nothing is
    downloaded, nothing but the counts is computed."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        config = read(folder)
    else:
        config = AutoConfig.for_model(choose("folder or model type", source, TYPES[: len(MODELS)]))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return patch(model, **settings)


def patch_folder(source: str, out: str | Path, *, progress: Callable[[str, int, int], None], **settings: Any) -> Counts:
    """`patch` the model in a folder, or on the Hugging Face hub, and write it to `out` with its tokenizer.

    `progress` is told (what, parts done, parts in all). Raises `UserError` for a model that cannot be opened or
    patched, and where `out` holds something already.
    """
    out, folder = Path(out).expanduser(), Path(source).expanduser()
    folders.check_free(out)
    folder = folder if folder.is_dir() else folders.download(source)
    progress(f"reading {source}", 0, 3)
    model = load(folder)
    progress("patching, and asking the laws", 1, 3)
    counts = patch(model, **settings)
    progress(f"writing {out}", 2, 3)
    with folders.whole(out) as half:
        model.save_pretrained(half)
        for pattern in BESIDE:
            for file in folder.glob(pattern):
                shutil.copy(file, half)
        (half / "README.md").write_text(card(model, folder.name, counts), "utf-8")
    return counts


def read(folder: Path) -> PretrainedConfig:
    """The config of a model that can be patched."""
    kind = folders.about(folder)["config"].get("model_type")
    choose(f"model_type in {folder}:", str(kind), TYPES)
    return AutoConfig.from_pretrained(folder)


def load(folder: Path) -> Any:
    """The model in `folder`, every tensor of it found there."""
    config = read(folder)
    try:
        found: Any = AutoModelForCausalLM.from_pretrained(folder, config=config, output_loading_info=True)
    except (OSError, RuntimeError, SafetensorError) as error:
        why = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"{folder} does not hold the weights that its config.json describes ({why})") from None
    model, told = found
    if missing := sorted(told["missing_keys"]):
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise UserError(f"{folder} lacks the tensor {missing[0]}{more}; its weights do not belong to its config.json")
    return model.eval()


def card(model: Any, source: str, counts: Counts) -> str:
    """README.md of a patched model."""
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
