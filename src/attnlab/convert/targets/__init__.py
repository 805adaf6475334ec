"""One file per mechanism that a dense layer can become; the folder listing is the registry.

A target says how wide it may be, and makes a layer's weights. It defines

    METHODS                                        ways to make the weights -> whether they read calibration text
    widths(source: Dense, wish: Wish) -> fields     of the mechanism's Config
    weights(source: Dense, config, method, seen) -> (fields, tensors)
                                                   further fields of this layer, and its state dict by name; a bias that
                                                   the layer lacks must be 0, what is left out stays as it is born
    energies(source: Dense, config, method, seen)  optional: what each rank is worth, greatest first
    finish(model, source, batches, tell)           optional: what is learnt from calibration text once all is in place
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from ...errors import choose


def names() -> list[str]:
    return sorted(found.name for found in pkgutil.iter_modules(__path__))


def module(name: str) -> ModuleType:
    return importlib.import_module(f".{choose('target of a conversion', name, names())}", __name__)
