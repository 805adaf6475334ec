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
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from ...errors import choose


def names() -> list[str]:
    """Return the mechanisms that a dense layer can become, in alphabetical order."""
    return sorted(found.name for found in pkgutil.iter_modules(__path__))


def module(name: str) -> ModuleType:
    """Return `targets/<name>.py`. Raises `UserError` for an unknown name."""
    return importlib.import_module(f".{choose('target of a conversion', name, names())}", __name__)
