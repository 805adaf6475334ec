"""Models of transformers: import this, and `AutoModelForCausalLM` loads our Decoders and the models that we patched."""

from __future__ import annotations

from typing import Any

from ..errors import need

need("transformers", "hf")

from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

from .decoder import AttnlabConfig, AttnlabForCausalLM  # noqa: E402
from .hosts import MODELS  # noqa: E402

CLASSES: tuple[Any, ...] = (AttnlabForCausalLM, *MODELS)
for cls in CLASSES:
    AutoConfig.register(cls.config_class.model_type, cls.config_class)
    AutoModelForCausalLM.register(cls.config_class, cls)

__all__ = ["AttnlabConfig", "AttnlabForCausalLM"]
