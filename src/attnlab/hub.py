"""The old name of `attnlab.pretrained`, for scripts that were written before it was renamed."""

from __future__ import annotations

from .pretrained import Loaded, build, load, module, names, save
from .pretrained import tokenizer_json as vocabulary

__all__ = ["Loaded", "build", "load", "module", "names", "save", "vocabulary"]
