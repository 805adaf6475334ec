"""Folders of models, read without running any code in them, and written atomically."""

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
from ..data.declared import ends_of
from ..errors import UserError, need
from ..files import read_json, write_bytes, write_json
from . import tokenizer_json

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
WANTED = ["*.json", "*.jinja", "*.safetensors"]  # the files to download of a model on the hub


class LazyTensor(NamedTuple):
    """A tensor on the disk, whose shape is known before it is read."""

    shape: tuple[int, ...]
    load: Callable[[], Tensor]


def download(name: str) -> Path:
    """Return the folder of a model on the Hugging Face hub, from the cache on this machine if it is there.

    Raises `UserError` for a name that cannot be one, and where the hub does not give it.
    """
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


def describe(folder: Path) -> dict[str, Any]:
    """Return a folder's "config", and where it has them "generation_config", "tokenizer_config" and "chat_template".

    Special tokens that only special_tokens_map.json names are added to the tokenizer_config.

    Raises `UserError` where there is no config.json, or one that is no JSON object.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has neither run.json nor config.json; give the folder of a run or of a model")
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise UserError(f"{folder / 'config.json'} is not a JSON object; take the file that came with the model")
    found: dict[str, Any] = {"config": config}
    template = None
    for name, file in (("generation_config", "generation_config.json"), ("tokenizer_config", "tokenizer_config.json")):
        if (folder / file).is_file():
            found[name] = read_json(folder / file)
            if not isinstance(found[name], dict):
                raise UserError(f"{folder / file} is not a JSON object; take the file that came with the model")
    if (folder / "special_tokens_map.json").is_file():
        named = read_json(folder / "special_tokens_map.json")
        found["tokenizer_config"] = {**named, **_without_nulls(found.get("tokenizer_config", {}))}
    if "tokenizer_config" in found:
        template = found["tokenizer_config"].pop("chat_template", None)
    if isinstance(template, list):  # several, by name
        template = {each["name"]: each["template"] for each in template}.get("default")
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text("utf-8")
    return found if template is None else {**found, "chat_template": template}


def _without_nulls(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def folder_tokenizer(folder: Path) -> data.Tokenizer | None:
    """Return the tokenizer in `folder`, None where there is none."""
    path = folder / "tokenizer.json"
    return tokenizer_json.parse_tokenizer(read_json(path), ends_of(folder)) if path.is_file() else None


def tensors(folder: Path, trust: bool = False) -> dict[str, LazyTensor]:
    """Return the tensors of a folder by name: from one safetensors file, several with an index, or pytorch_model.bin.

    Raises `UserError` where there is none of these, or a damaged one, or a pickle that `trust` does not allow.
    """
    for name, open_file in (("model.safetensors", _safe), ("pytorch_model.bin", _pickled)):
        if (folder / name).is_file():
            return open_file(folder / name, trust)
        index = folder / f"{name}.index.json"
        if index.is_file():
            parts = sorted(set(read_json(index)["weight_map"].values()))
            return {key: each for part in parts for key, each in open_file(folder / part, trust).items()}
    raise UserError(f"{folder} has a config.json but no model.safetensors; bring the weights there")


def _safe(path: Path, trust: bool) -> dict[str, LazyTensor]:
    try:
        file = safe_open(str(path), "pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is missing or damaged ({error}); fetch or export it again") from None

    def stored(name: str) -> LazyTensor:
        # opened anew: an open file keeps in memory all that was read from it
        return LazyTensor(tuple(file.get_slice(name).get_shape()), lambda: safe_open(str(path), "pt").get_tensor(name))

    return {name: stored(name) for name in file.keys()}


def _pickled(path: Path, trust: bool) -> dict[str, LazyTensor]:
    return stored(unpickle(path, trust), path)


def stored(state: Any, path: Path) -> dict[str, LazyTensor]:
    """Return a state dict as if it were on the disk. Raises `UserError` where it holds anything but tensors."""
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} holds something else than named tensors; give a checkpoint of a model")

    def one(tensor: Tensor) -> LazyTensor:
        return LazyTensor(tuple(tensor.shape), lambda: tensor)

    return {str(name): one(tensor) for name, tensor in state.items()}


def nanogpt(path: Path, trust: bool = False) -> tuple[dict[str, Any], dict[str, LazyTensor]]:
    """Return the "config" (and "step" and "results") of nanoGPT's ckpt.pt, and its tensors.

    Its tokenizer, a pickle elsewhere, is not read. Raises `UserError` for any other file.
    """
    held = unpickle(path, trust)
    if not isinstance(held, dict) or not {"model", "model_args"} <= set(held):
        raise UserError(f"{path} is not a checkpoint of nanoGPT: it has no model and model_args; give a model's folder")
    about: dict[str, Any] = {"config": {**held["model_args"], "model_type": "nanogpt"}}
    if "iter_num" in held:
        about["step"] = int(held["iter_num"])
    if "best_val_loss" in held:
        about["results"] = {"best validation loss, nats per token": float(held["best_val_loss"])}
    state = stored(held["model"], path)
    found: dict[str, LazyTensor] = {}
    for name, tensor in state.items():
        if found.setdefault(name.removeprefix("_orig_mod."), tensor) is not tensor:
            raise UserError(f"{path} has the tensor {name.removeprefix('_orig_mod.')} twice; save it again")
    return about, found


def unpickle(path: Path, trust: bool) -> Any:
    """Return the content of a file of torch.save: plain tensors, numbers and containers of them, unless `trust`.

    Raises `UserError` for a file that is missing, damaged, or holds anything else.
    """
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


def write_folder(
    folder: Path,
    config: Mapping[str, Any],
    state: dict[str, Tensor],
    card: str,
    tokenizer: data.Tokenizer | None,
    about: Mapping[str, Any],
) -> Path:
    """Write a folder in the form of the Hugging Face hub, with all files or not at all, and return it.

    `config` is the content of config.json, `card` that of README.md. `about`: see `describe`; its generation_config,
    tokenizer_config and chat_template are written too. Raises `UserError` where `folder` is not empty, or cannot be
    written.
    """
    with atomic(folder) as half:
        save_file(state, half / "model.safetensors", {"format": "pt"})
        write_json(half / "config.json", config)
        write_bytes(half / "README.md", card.encode())
        if tokenizer is not None:
            write_json(half / "tokenizer.json", tokenizer_json.written(tokenizer), indent=None)
            settings = about.get("tokenizer_config") or tokenizer_json.config(tokenizer)
            write_json(half / "tokenizer_config.json", settings)
        if "generation_config" in about:
            write_json(half / "generation_config.json", about["generation_config"])
        if "chat_template" in about:
            write_bytes(half / "chat_template.jinja", about["chat_template"].encode())
    return folder


@contextmanager
def atomic(folder: Path) -> Iterator[Path]:
    """Yield a hidden folder beside `folder`, which gets that name at the end; after an error it is removed.

    Raises `UserError` where `folder` is not empty, or cannot be written.
    """
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
    """Raise `UserError` where `folder` holds something already."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists already; name a new or an empty folder")


def _umask() -> int:
    """Return the process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
