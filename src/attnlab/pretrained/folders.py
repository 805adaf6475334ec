"""Folders and files of models: opening them without running what is in them, and writing them whole or not at all."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .. import data
from ..errors import UserError, need
from ..files import read_json, write_bytes, write_json
from . import tokenizer_json

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
WANTED = ["*.json", "*.jinja", "*.safetensors"]  # of a model on the hub


class Stored(NamedTuple):
    """A tensor on the disk: its shape is known before it is read."""

    shape: tuple[int, ...]
    load: Callable[[], Tensor]


def download(name: str) -> Path:
    """The folder of a model on the Hugging Face hub, from the cache on this machine where it is there."""
    if not HUB_NAME.fullmatch(name):
        raise UserError(f"{name} does not exist: give the folder of a run or of a model, a ckpt.pt, or a hub name")
    hub = need("huggingface_hub", "hf")
    try:
        return Path(hub.snapshot_download(name, allow_patterns=WANTED))
    except (OSError, ValueError, hub.errors.HfHubHTTPError) as error:
        why = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(
            f"{name} is no folder here, and the Hugging Face hub does not give it ({why}); check the name, or give the "
            "folder of a model that you have"
        ) from None


def about(folder: Path) -> dict[str, Any]:
    """What a folder says of itself: "config", and where it has them "tokenizer_config" and "chat_template"."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has neither run.json nor config.json; give the folder of a run or of a model")
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise UserError(f"{folder / 'config.json'} is not a JSON object; take the file that came with the model")
    found: dict[str, Any] = {"config": config}
    template = None
    if (folder / "tokenizer_config.json").is_file():
        found["tokenizer_config"] = read_json(folder / "tokenizer_config.json")
        template = found["tokenizer_config"].pop("chat_template", None)
    if isinstance(template, list):  # several, by name
        template = {each["name"]: each["template"] for each in template}.get("default")
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text("utf-8")
    return found if template is None else {**found, "chat_template": template}


def tokenizer(folder: Path) -> data.Tokenizer | None:
    """The tokenizer in `folder`, if there is one."""
    path = folder / "tokenizer.json"
    return tokenizer_json.read(read_json(path)) if path.is_file() else None


def tensors(folder: Path, trust: bool = False) -> dict[str, Stored]:
    """The tensors of a folder: one safetensors file, several with an index, or pytorch_model.bin."""
    for name, open_file in (("model.safetensors", _safe), ("pytorch_model.bin", _pickled)):
        if (folder / name).is_file():
            return open_file(folder / name, trust)
        if (index := folder / f"{name}.index.json").is_file():
            parts = sorted(set(read_json(index)["weight_map"].values()))
            return {key: each for part in parts for key, each in open_file(folder / part, trust).items()}
    raise UserError(f"{folder} has a config.json but no model.safetensors; bring the weights there")


def _safe(path: Path, trust: bool) -> dict[str, Stored]:
    try:
        file = safe_open(str(path), "pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is missing or damaged ({error}); fetch or export it again") from None

    def stored(name: str) -> Stored:
        # opened anew: a window on the file stays in memory, as far as it was read, for as long as it is open
        return Stored(tuple(file.get_slice(name).get_shape()), lambda: safe_open(str(path), "pt").get_tensor(name))

    return {name: stored(name) for name in file.keys()}


def _pickled(path: Path, trust: bool) -> dict[str, Stored]:
    return stored(unpickle(path, trust), path)


def stored(state: Any, path: Path) -> dict[str, Stored]:
    """A state dict, as if it lay on the disk."""
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} holds something else than named tensors; give a checkpoint of a model")

    def one(tensor: Tensor) -> Stored:
        return Stored(tuple(tensor.shape), lambda: tensor)

    return {str(name): one(tensor) for name, tensor in state.items()}


def nanogpt(path: Path, trust: bool = False) -> tuple[dict[str, Any], dict[str, Stored]]:
    """What nanoGPT's ckpt.pt says of itself, and its tensors. Its tokenizer, a pickle elsewhere, is left alone."""
    held = unpickle(path, trust)
    if not isinstance(held, dict) or not {"model", "model_args"} <= set(held):
        raise UserError(f"{path} is not a checkpoint of nanoGPT: it has no model and model_args; give a model's folder")
    about: dict[str, Any] = {"config": {**held["model_args"], "model_type": "nanogpt"}}
    if "iter_num" in held:
        about["step"] = int(held["iter_num"])
    if "best_val_loss" in held:
        about["results"] = {"best validation loss, nats per token": float(held["best_val_loss"])}
    state = stored(held["model"], path)
    return about, {name.removeprefix("_orig_mod."): tensor for name, tensor in state.items()}


def unpickle(path: Path, trust: bool) -> Any:
    """What torch.save wrote. Only plain tensors, numbers and containers of them, unless `trust`."""
    try:
        return torch.load(path, map_location="cpu", weights_only=not trust)
    except FileNotFoundError:
        raise UserError(f"{path} is missing; fetch it again") from None
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} is not a plain archive of tensors: opening it could run code that it brings; "
            "add --trust only if you trust whoever wrote it"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        why = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{path} is damaged or not a checkpoint ({why}); fetch it again") from None


def write(
    folder: Path,
    config: Mapping[str, Any],
    state: dict[str, Tensor],
    card: str,
    tokenizer: data.Tokenizer | None,
    about: Mapping[str, Any],
) -> Path:
    """A folder in the form of the Hugging Face hub. It appears whole or not at all."""
    with whole(folder) as half:
        save_file(state, half / "model.safetensors", {"format": "pt"})
        write_json(half / "config.json", config)
        write_bytes(half / "README.md", card.encode())
        if tokenizer is not None:
            write_json(half / "tokenizer.json", tokenizer_json.written(tokenizer), indent=None)
            write_json(
                half / "tokenizer_config.json", about.get("tokenizer_config") or tokenizer_json.config(tokenizer)
            )
        if "chat_template" in about:
            write_bytes(half / "chat_template.jinja", about["chat_template"].encode())
    return folder


@contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """A hidden folder beside `folder` to write into; it takes that name once all is written, else it goes away."""
    check_free(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        half = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    except OSError as error:
        raise UserError(f"{folder} cannot be made ({error.strerror}); name a folder that you may write to") from None
    try:
        half.chmod(0o777 & ~_umask())
        yield half
        os.replace(half, folder)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {folder} ({error}); free space or choose another folder") from None
    finally:
        shutil.rmtree(half, ignore_errors=True)


def check_free(folder: Path) -> None:
    """A `UserError` where `folder` holds something already."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists already; name a new or an empty folder")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
