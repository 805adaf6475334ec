"""attnlab: the ModelConfig as it is, and the tensors under the names of the Decoder, below "model.".

A field for which transformers has a name of its own stands under that name, and nowhere else: transformers changes it
there, as `resize_token_embeddings` does. The field `attnlab` holds all others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ...config import ModelConfig, from_dict, to_dict
from ...errors import UserError
from ...model import Decoder
from ..tensor_names import Row, ours, same

MODEL_TYPES = ("attnlab",)
MECHANISMS: tuple[str, ...] = ()  # any
PREFIX = "model."
EXTRA = ()
NAMES = {  # our fields, and what transformers calls them
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "context": "max_position_embeddings",
    "tied": "tie_word_embeddings",
}


def to_model_config(hf: Mapping[str, Any]) -> ModelConfig:
    """Return the ModelConfig of the config.json of an exported folder.

    Folders of earlier versions have the fields of NAMES twice. Raises `UserError` where the two differ, but for the
    vocabulary, which transformers may have resized.
    """
    if not isinstance(hf.get("attnlab"), dict):
        raise UserError("config.json says model_type attnlab, but has no field 'attnlab'; export the model again")
    fields = dict(hf["attnlab"])
    for name, theirs in NAMES.items():
        if hf.get(theirs) is None:
            continue
        if name != "vocab_size" and fields.get(name, hf[theirs]) != hf[theirs]:
            raise UserError(
                f"config.json says {theirs} = {hf[theirs]!r}, and attnlab.{name} = {fields[name]!r} is another; leave "
                "out the wrong one"
            )
        fields[name] = hf[theirs]
    return from_dict(ModelConfig, fields)


def from_model_config(config: ModelConfig) -> dict[str, Any]:
    """Return the config.json of an exported folder for a ModelConfig."""
    fields = to_dict(config)
    return {
        "model_type": "attnlab",
        "architectures": ["AttnlabForCausalLM"],
        **{theirs: fields.pop(name) for name, theirs in NAMES.items()},
        "attnlab": fields,
    }


def table(model: Decoder) -> Iterator[Row]:
    """Return the rows of tensor names."""
    return (same(name, f"model.{name}") for name in ours(model))
