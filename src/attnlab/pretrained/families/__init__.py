"""One family of models, one file; the folder listing is the registry.

MODEL_TYPES                   the `model_type` of the config.json files that it reads
MECHANISMS                    the mechanisms that it has; (): any
to_model_config(hf)           that config -> ModelConfig; raises `UserError` for what we cannot compute
from_model_config(config)     and back, as far as the family can express it; left out where we only read
table(model)                  rows of tensor names, with what happens on the way (see `tensor_names.py`)
PREFIX                        the part of a name that a checkpoint of the model without its head leaves out
EXTRA                         kinds of tensors that are compared and not read (see `extras.py`)
SLOT                          the attention of layer {}, where `attnlab patch` may replace it; left out where it may not
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType


def names() -> list[str]:
    """Return the families, in alphabetical order."""
    return sorted(found.name for found in pkgutil.iter_modules(__path__))


def module(name: str) -> ModuleType:
    """Return `families/<name>.py`."""
    return importlib.import_module(f".{name}", __name__)
