"""One file per mechanism that a dense layer can become; the folder listing is the registry.

A target says how wide it may be, and makes a layer's weights. It defines

    METHODS                                        ways to make the weights -> whether they read calibration text
    widths(source: Dense, budget: Budget)          fields of the mechanism's Config
    weights(source: Dense, config, method, seen)   (fields, tensors): further fields of this layer, and its state dict
                                                   by name. A bias that the layer lacks must be 0; a tensor that is left
                                                   out keeps its initial value
    energies(source: Dense, config, method, seen)  optional: how much error each rank removes, greatest first
    finish(model, source, batches, tell)           optional: trains on calibration text once all layers are in place

`seen` are the layer's `Statistics`, None where the method reads no text.

A mechanism, an installed package's too, needs no file here where its own module defines

    weights_from(source: Dense, config)            the state dict of a layer, by name
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from ... import attention
from ...errors import choose
from ..own_weights import OwnWeights


def names() -> list[str]:
    """Return the mechanisms that a dense layer can become, in alphabetical order."""
    return sorted({*_files(), *(name for name in attention.names() if attention.defines(name, "weights_from"))})


def module(name: str) -> Any:
    """Return `targets/<name>.py`, or the same made from the mechanism's own `weights_from`. Raises `UserError` for an
    unknown name."""
    choose("target of a conversion", name, names())
    if name in _files():
        return importlib.import_module(f".{name}", __name__)
    return OwnWeights.of(name, attention.module(name).weights_from)


def _files() -> set[str]:
    return {found.name for found in pkgutil.iter_modules(__path__)}
