"""attnlab: a workbench for attention mechanisms in language models.

`import attnlab` is light: a name below is looked up in its module when it is first used, so that PyTorch is imported
only by code that computes.
"""

from __future__ import annotations

import importlib

TYPE_CHECKING = False
if TYPE_CHECKING:  # importing typing takes longer than all else here, and Ctrl-C is not heard before this is done
    from typing import Any

__version__ = "0.1.0"

# public name -> the module that defines it
_HOME = {
    "UserError": "errors",
    "AttentionConfig": "spec",
    "CacheSpec": "spec",
    "Mask": "spec",
    "CAUSAL": "spec",
    "ModelConfig": "config",
    "DataConfig": "config",
    "TrainConfig": "config",
    "RunConfig": "config",
    "Cache": "cache",
    "extend": "cache",
    "attend": "ops",
    "rope": "ops",
    "record_attention": "recording",
    "record_losses": "recording",
    "Decoder": "model",
    "check_attention": "laws",
    "load_model": "runs.folder",
    "generate": "inference.generate",
    "patch": "hf.patch",
}
_MODULES = ("attention", "laws", "ops", "presets", "spec")

__all__ = ["__version__", *sorted(_MODULES), *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"attnlab.{name}")
    if name in _HOME:
        return getattr(importlib.import_module(f"attnlab.{_HOME[name]}"), name)
    raise AttributeError(f"module 'attnlab' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
