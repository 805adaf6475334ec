"""Rotary embedding in a Hugging Face config.

It has two forms: `rope_parameters`, and the older `rope_theta` with `rope_scaling`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..config import ModelConfig
from ..errors import choose
from ..spec import UNSCALED, RopeScaling
from .tensor_names import only

KINDS = ("default", "linear", "llama3", "yarn")


def rope_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rotary fields of a config in the newer form, from either."""
    found = {
        "rope_theta": hf.get("rope_theta") or 10_000.0,
        **(hf.get("rope_parameters") or hf.get("rope_scaling") or {}),
    }
    found.setdefault("rope_type", found.get("type", "default"))
    return found


def rotary(hf: Mapping[str, Any]) -> tuple[float, RopeScaling]:
    """Return (theta, scaling) of a config. Raises `UserError` for an unknown kind of scaling."""
    r = rope_fields(hf)
    only({**hf, **r}, partial_rotary_factor=1.0)
    theta = float(r["rope_theta"])
    kind = choose("rope_type", r["rope_type"], KINDS)
    if kind == "default":
        return theta, UNSCALED
    longest = hf["max_position_embeddings"]
    original = hf.get("original_max_position_embeddings") or r.get("original_max_position_embeddings") or longest
    factor = r.get("factor") or longest / original
    if kind == "linear":
        return theta, RopeScaling(kind="linear", factor=factor)
    if kind == "llama3":
        return theta, RopeScaling(
            kind="llama3",
            factor=factor,
            original=original,
            slow=r["low_freq_factor"],
            fast=r["high_freq_factor"],
        )
    return theta, RopeScaling(
        kind="yarn",
        factor=factor,
        original=original,
        slow=r.get("beta_slow") or 1.0,
        fast=r.get("beta_fast") or 32.0,
        whole=r.get("truncate", True),
        magnitude=attention_factor(r, factor),
    )


def attention_factor(r: Mapping[str, Any], factor: float) -> float:
    """Return YaRN's attention factor from rotary fields: as given, or from mscale, or from `factor` alone."""
    if r.get("attention_factor") is not None:
        return float(r["attention_factor"])
    if r.get("mscale") and r.get("mscale_all_dim"):
        return mscale(factor, r["mscale"]) / mscale(factor, r["mscale_all_dim"])
    return mscale(factor)


def mscale(factor: float, weight: float = 1.0) -> float:
    """Return YaRN's factor of rotated vectors for a context that is `factor` times longer: it sharpens attention."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def rotary_parameters(config: ModelConfig) -> dict[str, Any]:
    """Return the `rope_parameters` of a model: the inverse of `rotary`."""
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
