"""Folders of models, read without running any code in them, and written atomically."""

from __future__ import annotations

import pickle
import re
import warnings
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
from ..files import naming, path_within, read_json, regular, unreadable, whole_folder, write_bytes, write_json
from . import tokenizer_json
from .schemas import ORIGINAL, ModelFile, TokenizerSettings

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
WANTED = ["*.json", "*.jinja", "*.safetensors"]  # the files to download of a model on the hub
GGUF = b"GGUF"  # the beginning of such a file
NO_GGUF = (
    "which is not read here: give the folder of safetensors that it was made from, or let transformers write one "
    "(from_pretrained(FOLDER, gguf_file=NAME).save_pretrained(OUT))"
)


class LazyTensor(NamedTuple):
    """A tensor on the disk, whose shape is known before it is read."""

    shape: tuple[int, ...]
    load: Callable[[], Tensor]
    floating: bool = True  # whether it holds floating-point numbers


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
    packed = next(iter(sorted(folder.glob("*.gguf"))), None)
    if packed is not None and not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds {packed.name}, a GGUF file, {NO_GGUF}")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has neither run.json nor config.json; give the folder of a run or of a model")
    config = read_json(folder / "config.json", ModelFile, ORIGINAL)
    found: dict[str, Any] = {"config": config}
    template = None
    for name, file in (("generation_config", "generation_config.json"), ("tokenizer_config", "tokenizer_config.json")):
        if (folder / file).is_file():
            schema = TokenizerSettings if name == "tokenizer_config" else dict
            found[name] = read_json(folder / file, schema, ORIGINAL)
    if (folder / "special_tokens_map.json").is_file():
        named = read_json(folder / "special_tokens_map.json", dict, ORIGINAL)
        found["tokenizer_config"] = {**named, **_without_nulls(found.get("tokenizer_config", {}))}
    if "tokenizer_config" in found:
        template = found["tokenizer_config"].pop("chat_template", None)
    if isinstance(template, list):  # several, by name
        template = {each["name"]: each["template"] for each in template}.get("default")
    if (folder / "chat_template.jinja").is_file():
        template = _template(folder / "chat_template.jinja")
    return found if template is None else {**found, "chat_template": template}


def _template(path: Path) -> str:
    try:
        return regular(path).read_text("utf-8")
    except OSError as error:
        raise UserError(unreadable(path, error)) from None
    except ValueError:
        raise UserError(f"{path} is not UTF-8 text: {ORIGINAL}") from None


def _without_nulls(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def folder_tokenizer(folder: Path) -> data.Tokenizer | None:
    """Return the tokenizer in `folder`, None where there is none."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    held = read_json(path, dict, ORIGINAL)
    with naming(path, ORIGINAL):
        return tokenizer_json.parse_tokenizer(held, ends_of(folder))


def tensors(folder: Path, trust: bool = False) -> dict[str, LazyTensor]:
    """Return the tensors of a folder by name: from one safetensors file, several with an index, or pytorch_model.bin.

    Raises `UserError` where there is none of these, or a damaged one, or a pickle that `trust` does not allow.
    """
    for name, open_file in (("model.safetensors", _safe), ("pytorch_model.bin", _pickled)):
        if (folder / name).is_file():
            return open_file(folder / name, trust)
        index = folder / f"{name}.index.json"
        if index.is_file():
            parts = indexed(index)
            return {key: each for part in parts for key, each in open_file(part, trust).items()}
    raise UserError(f"{folder} has a config.json but no model.safetensors; bring the weights there")


def indexed(index: Path) -> list[Path]:
    """Return the files that an index of tensors names. Raises `UserError` for an index that is none, and for a file in
    another folder."""
    held = read_json(index)
    places = held.get("weight_map") if isinstance(held, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise UserError(
            f"{index} has no weight_map of tensor names and their files; take the file that came with the model"
        )
    return [regular(path_within(index.parent, name, index)) for name in sorted(set(places.values()))]


def _safe(path: Path, trust: bool) -> dict[str, LazyTensor]:
    try:
        file = safe_open(str(path), "pt")
    except PermissionError as error:
        raise UserError(unreadable(path, error)) from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is missing or damaged ({error}); fetch or export it again") from None

    def stored(name: str) -> LazyTensor:
        # opened anew: an open file keeps in memory all that was read from it
        held = file.get_slice(name)
        floating = "F" in held.get_dtype()  # F32, BF16, F8_E4M3
        return LazyTensor(tuple(held.get_shape()), lambda: safe_open(str(path), "pt").get_tensor(name), floating)

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
    refuse_other_files(path)
    held = unpickle(path, trust)
    if not isinstance(held, dict) or not {"model", "model_args"} <= set(held):
        raise UserError(f"{path} is not a checkpoint of nanoGPT: it has no model and model_args; give a model's folder")
    if not isinstance(held["model_args"], dict):
        raise UserError(f"{path} has model_args that name no fields; fetch it again")
    about: dict[str, Any] = {"config": {**held["model_args"], "model_type": "nanogpt"}}
    if isinstance(held.get("iter_num"), int):
        about["step"] = held["iter_num"]
    if isinstance(held.get("best_val_loss"), int | float | Tensor):
        about["results"] = {"best validation loss, nats per token": float(held["best_val_loss"])}
    state = stored(held["model"], path)
    found: dict[str, LazyTensor] = {}
    for name, tensor in state.items():
        if found.setdefault(name.removeprefix("_orig_mod."), tensor) is not tensor:
            raise UserError(f"{path} has the tensor {name.removeprefix('_orig_mod.')} twice; save it again")
    return about, found


def refuse_other_files(path: Path) -> None:
    """Raise `UserError` for a single file that is no checkpoint of PyTorch: GGUF, or safetensors without a config."""
    with regular(path).open("rb") as file:
        begin = file.read(16)
    if begin.startswith(GGUF) or path.suffix == ".gguf":
        raise UserError(f"{path} is a GGUF file, {NO_GGUF}")
    if path.suffix == ".safetensors" or begin[8:10] == b'{"':
        raise UserError(f"{path} holds tensors without a config.json: give the folder that has both")


def unpickle(path: Path, trust: bool) -> Any:
    """Return the content of a file of torch.save: plain tensors, numbers and containers of them, unless `trust`.

    Raises `UserError` for a file that is missing, damaged, or holds anything else.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what the file is, which is said below
            return torch.load(regular(path), map_location="cpu", weights_only=not trust)
    except FileNotFoundError:
        raise UserError(f"{path} is missing; fetch it again") from None
    except PermissionError as error:
        raise UserError(unreadable(path, error)) from None
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} is not a plain archive of tensors: opening it could run code that it brings; "
            "add --trust only if you trust whoever wrote it"
        ) from None
    except Exception as error:  # a pickle can fail in any way
        why = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{path} is damaged or not a checkpoint ({why}); fetch it again") from None


def write_folder(
    folder: Path,
    config: Mapping[str, Any],
    state: dict[str, Tensor],
    card: str,
    tokenizer: data.Tokenizer | None,
    about: Mapping[str, Any],
    more: Mapping[str, Any] | None = None,
) -> Path:
    """Write a folder in the form of the Hugging Face hub, with all files or not at all, and return it.

    `config` is the content of config.json, `card` that of README.md. `about`: see `describe`; its generation_config,
    tokenizer_config and chat_template are written too. `more`: further JSON files, by name. Raises `UserError` where
    `folder` is not empty, or cannot be written.
    """
    with whole_folder(folder) as half:
        with tensor_errors():
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
        for name, content in (more or {}).items():
            write_json(half / name, content)
    return folder


@contextmanager
def tensor_errors() -> Iterator[None]:
    """Raise `OSError` where safetensors cannot write a file: it has an error of its own for a full disk."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(0, str(error)) from None
