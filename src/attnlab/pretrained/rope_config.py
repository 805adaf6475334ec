"""How a Hugging Face config says that rotary pairs turn, in both of its forms: `rope_parameters`, and `rope_scaling`
beside `rope_theta` before it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..config import ModelConfig
from ..errors import choose
from ..spec import UNSCALED, RopeScaling
from .tensor_names import only

KINDS = ("default", "linear", "llama3", "yarn")


def said(hf: Mapping[str, Any]) -> dict[str, Any]:
    """What the config says, in the newer form."""
    found = {
        "rope_theta": hf.get("rope_theta") or 10_000.0,
        **(hf.get("rope_parameters") or hf.get("rope_scaling") or {}),
    }
    found.setdefault("rope_type", found.get("type", "default"))
    return found


def rotary(hf: Mapping[str, Any]) -> tuple[float, RopeScaling]:
    """(theta, scaling)."""
    r = said(hf)
    only({**hf, **r}, partial_rotary_factor=1.0)
    theta, kind = float(r["rope_theta"]), choose("rope_type", r["rope_type"], KINDS)
    if kind == "default":
        return theta, UNSCALED
    longest = hf["max_position_embeddings"]
    original = hf.get("original_max_position_embeddings") or r.get("original_max_position_embeddings") or longest
    factor = r.get("factor") or longest / original
    if kind == "linear":
        return theta, RopeScaling(kind="linear", factor=factor)
    if kind == "llama3":
        slow, fast = r["low_freq_factor"], r["high_freq_factor"]
        return theta, RopeScaling(kind="llama3", factor=factor, original=original, slow=slow, fast=fast)
    return theta, RopeScaling(
        kind="yarn",
        factor=factor,
        original=original,
        slow=r.get("beta_slow") or 1.0,
        fast=r.get("beta_fast") or 32.0,
        whole=r.get("truncate", True),
        magnitude=magnitude(r, factor),
    )


def magnitude(r: Mapping[str, Any], factor: float) -> float:
    """YaRN's attention factor."""
    if r.get("attention_factor") is not None:
        return float(r["attention_factor"])
    if r.get("mscale") and r.get("mscale_all_dim"):
        return stretch(factor, r["mscale"]) / stretch(factor, r["mscale_all_dim"])
    return stretch(factor)


def stretch(factor: float, weight: float = 1.0) -> float:
    """What YaRN multiplies rotated vectors with, because attention over more tokens is flatter."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def rotary_parameters(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `rotary`."""
    s = config.rope_scaling
    found: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_type": "default" if s.kind == "none" else s.kind}
    if s.kind != "none":
        found["factor"] = s.factor
    if s.kind in ("llama3", "yarn"):
        found["original_max_position_embeddings"] = s.original
    if s.kind == "llama3":
        found |= {"low_freq_factor": s.slow, "high_freq_factor": s.fast}
    if s.kind == "yarn":
        found |= {"beta_slow": s.slow, "beta_fast": s.fast, "truncate": s.whole, "attention_factor": s.magnitude}
    return found
