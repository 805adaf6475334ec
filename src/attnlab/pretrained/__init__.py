"""Trained models, read and written: run folders, exported folders, Hugging Face folders and names, nanoGPT's ckpt.pt.

Reading and writing need JSON and safetensors alone; no foreign code runs, and nothing is unpickled without `trust`.

A family is a file in `families/`: which `model_type` it reads, the config in both directions, and one table of tensor
names (see `tensor_names.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from .. import data
from ..config import ModelConfig, to_dict
from ..errors import UserError, choose
from ..files import expanded, regular
from ..model import Decoder, attention_configs
from ..ranges import Size, checked
from ..runs.folder import RunFolder, load_model
from . import extras, families, folders, model_card, tensor_names

INDIFFERENT = {"impl", "mode", "dropout", "warmup", "learn_every"}  # fields that change no logit of a trained model
RUN = "run"  # the family of a run folder
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")  # fields of a config beyond the model's shape


@dataclass(frozen=True)
class Loaded:
    """A trained model, with all that is needed to write it back."""

    model: Decoder  # in evaluation mode
    tokenizer: data.Tokenizer | None  # None: the source has none
    source: str  # as the user named it
    family: str  # "run", or the name of a file in `families/`
    about: Mapping[str, Any] = field(default_factory=dict)  # "config" of the source; "step", "results", "chat_template"

    @property
    def front(self) -> int | None:
        """The token before a document that is evaluated: as the source's config names it, else the tokenizer's."""
        named = self.about.get("config", {}).get("bos_token_id")
        own = () if self.tokenizer is None else self.tokenizer.starts
        return next(iter(own), None) if named is None else named


def names() -> list[str]:
    """Return the families, in alphabetical order."""
    return families.names()


def module(name: str) -> ModuleType:
    """Return `families/<name>.py`. Raises `UserError` for an unknown name."""
    return families.module(choose("family", name, names()))


@checked
def load(
    source: str | Path,
    *,
    checkpoint: Size | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    trust: bool = False,
) -> Loaded:
    """Return the model that `source` names: a folder, a file ckpt.pt, or a name on the Hugging Face hub.

    `checkpoint` is a step of a run folder (None: the newest). `trust` lets a pickle run the code in it. Raises
    `UserError` for a type of model that no family reads, and for tensors that are missing, left over or of a wrong
    shape.
    """
    path = regular(expanded(source))
    if (path / "run.json").is_file():
        return _load_run(path, str(source), checkpoint, dtype, device)
    if checkpoint is not None:
        raise UserError(f"{source} is not a run folder, so it has no checkpoint {checkpoint}; leave the checkpoint out")
    if path.is_file():
        about, found = folders.nanogpt(path, trust)
        tokenizer = None
    else:
        path = path if path.is_dir() else folders.download(str(source))
        about = folders.describe(path)
        found = folders.tensors(path, trust)
        tokenizer = folders.folder_tokenizer(path)
    known = {kind: name for name in names() for kind in module(name).MODEL_TYPES}
    family = known[choose(f"model_type in {path}:", str(about["config"].get("model_type")), known)]
    model = build(module(family), about["config"], found, str(source), dtype)
    return Loaded(model.to(device), tokenizer, str(source), family, about)


def _load_run(path: Path, source: str, step: int | None, dtype: torch.dtype, device: str | torch.device) -> Loaded:
    """Return the model of a run folder at `step` (None: the newest)."""
    folder = RunFolder.open(path)
    model, config = load_model(path, step, device)
    result = folder.result()
    about = {"config": to_dict(config), "step": folder.newest() if step is None else step}
    if result is not None:
        about["results"] = {"validation loss, nats per token": result.val_loss, "training tokens": result.tokens}
    return Loaded(model.to(dtype), folder.tokenizer(), source, RUN, about)


def build(
    family: ModuleType, hf: Mapping[str, Any], found: Mapping[str, folders.LazyTensor], source: str, dtype: torch.dtype
) -> Decoder:
    """Return the Decoder of a family's config and tensors, in evaluation mode.

    `hf` is the content of config.json, `source` its name for error messages. Raises `UserError` for a quantized model,
    for a config with missing or wrong fields, and for tensors that do not belong to it.
    """
    if hf.get("quantization_config"):
        raise UserError(f"{source} is quantized; bring it as float32, float16 or bfloat16")
    try:
        config = family.to_model_config(hf)
        if config.tied:
            config, found = extras.tied_or_not(config, family, tensor_names.full_names(found, family.PREFIX), source)
        model = empty(config)
    except KeyError as missing:
        raise UserError(f"the config.json of {source} lacks {missing}; take the one that came with it") from None
    except UserError as error:
        raise UserError(f"the config.json of {source} is of no model that there can be ({error}); mend it") from None
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(f"the config.json of {source} has a value of the wrong kind ({error}); mend it") from None
    rows = tensor_names.rows(family, model)
    wanted = tensor_names.expected(rows, tensor_names.ours(model))
    found = tensor_names.full_names(found, family.PREFIX)
    found = extras.left_out(family, (model, hf), found, wanted, source)
    stored = tensor_names.check_tensors(wanted, found, source)
    dtypes = {name: dtype for name, _ in model.named_parameters()}
    model.load_state_dict(tensor_names.read_tensors(rows, stored, dtypes, source), strict=False, assign=True)
    if model.config.tied:
        model.head.weight = model.embed.weight
    return model.eval()


def empty(config: ModelConfig) -> Decoder:
    """Return a Decoder on the meta device: its tensors have shapes and no values."""
    with torch.device("meta"):
        return Decoder(config)


@checked
def save(
    loaded: Loaded,
    folder: str | Path,
    *,
    family: str = "attnlab",
    results: Mapping[str, Any] | None = None,
    more: Mapping[str, Any] | None = None,
) -> Path:
    """Write the model in the form of `family`, and return the folder.

    It gets safetensors, config.json, the tokenizer's files and a model card; all of them or none. transformers reads
    the forms of its own families. `results`: numbers for the model card; None: those of the source. `more`: further
    JSON files, by name. Raises `UserError` where the family cannot express the model, saying which fields differ, and
    where `folder` is not empty.
    """
    theirs = module(family)
    hf = {**express(theirs, family, loaded.model.config), **_tokens(loaded), "dtype": _dtype(loaded.model)}
    state = tensor_names.write_tensors(tensor_names.rows(theirs, loaded.model), tensor_names.ours(loaded.model))
    results = loaded.about.get("results") if results is None else results
    source = Path(loaded.source)
    text = model_card.card(loaded.model, family, source.name if source.exists() else loaded.source, results)
    return folders.write_folder(expanded(folder), hf, state, text, loaded.tokenizer, loaded.about, more)


def express(theirs: ModuleType, family: str, config: ModelConfig) -> dict[str, Any]:
    """Return the config.json of this model in `family`, whose module is `theirs`.

    Raises `UserError` where reading it would not give the same model again.
    """
    if not hasattr(theirs, "from_model_config"):
        raise UserError(f"family {family!r} can only be read; write attnlab, gpt2 or another one instead")
    foreign = [name for name in dict.fromkeys(config.layers) if theirs.MECHANISMS and name not in theirs.MECHANISMS]
    if foreign:
        raise UserError(
            f"{family} cannot express this model: they differ in mechanisms ({', '.join(theirs.MECHANISMS)} there, "
            f"{', '.join(foreign)} here); write family 'attnlab', or convert the model first"
        )
    hf = theirs.from_model_config(config)
    mine = facts(config)
    again = facts(theirs.to_model_config(hf))
    wrong = [name for name in {**mine, **again} if differ(mine.get(name), again.get(name))]
    if wrong:
        shown = ", ".join(f"{name} ({again.get(name)} there, {mine.get(name)} here)" for name in wrong[:3])
        more = f" and {len(wrong) - 3} more" if wrong[3:] else ""
        raise UserError(f"{family} cannot express this model: they differ in {shown}{more}; write family 'attnlab'")
    return hf


def facts(config: ModelConfig) -> dict[str, Any]:
    """Return all fields that the logits depend on, by name."""
    names = ["vocab_size", "context", "n_layers", "d_model", "positions", "norm", "ff", "bias", "tied"]
    experts = ["n_experts", "experts_per_token"] if config.ff == "moe" else []
    found: dict[str, Any] = {name: getattr(config, name) for name in names + experts}
    found |= {"norm_eps": config.resolved_norm_eps, "ff_dim": config.resolved_ff_dim}
    if experts:
        found |= {f"experts.{name}": value for name, value in asdict(config.experts).items()}
        found["experts.width"] = config.resolved_expert_dim
    for i, each in enumerate(attention_configs(config)):
        found |= {f"{name} of layer {i}": value for name, value in asdict(each).items() if name not in INDIFFERENT}
    return found


def differ(a: Any, b: Any) -> bool:
    """Return whether two fields differ; floats may by 1e-9 of their size."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() != b.keys() or any(differ(a[name], b[name]) for name in a)
    if isinstance(a, float) and isinstance(b, float):
        return not math.isclose(a, b, rel_tol=1e-9)
    return bool(a != b)


def _dtype(model: Decoder) -> str:
    """Return the name of the dtype, such as float32."""
    return str(model.embed.weight.dtype).removeprefix("torch.")


def _tokens(loaded: Loaded) -> dict[str, Any]:
    """Return the ids of `TOKENS`: those of the source's config, else the tokenizer's own end, or ends."""
    ends = loaded.tokenizer.ends if loaded.tokenizer is not None else ()
    end = list(ends) if len(ends) > 1 else next(iter(ends), None)
    first = next(iter(ends), None)
    given = loaded.about.get("config", {})
    return {name: given.get(name, default) for name, default in zip(TOKENS, (first, end, None), strict=True)}
