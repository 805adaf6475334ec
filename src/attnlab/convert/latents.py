"""Latents made smaller: a model of latent attention at a lower rank.

A latent is c = w * z / rms(z) with z = W_dkv x (R floats), and keys and values are M c. The factors of M diag(w) that
lose least at rank r span r directions U (R r, orthonormal) of z; the new latent is U^T z, and its norm takes the part
of z that is left. What that part is in the mean is put into the new up-projections. At full rank U is a rotation, and
nothing is lost. Queries, rotary keys and an indexer stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..attention import mla, msla
from ..errors import UserError
from .calibration import Statistics
from .dense import affine
from .low_rank import low_rank
from .width import Budget

MODELS = ("kv_rank", "d_model", "n_heads", "rope_scaling", "impl")  # fields that are the model's, or made here
BASE = ("head_dim", "bias", "rope_theta", "dropout")  # whose defaults are the model's
FREE = ("impl", "mode", "dropout", "warmup", "learn_every")  # fields that the options may change


@dataclass(frozen=True)
class Latent:
    """One layer of latents as a value, in float64."""

    tensors: Mapping[str, Tensor]  # its state dict
    down: Tensor  # affine, (R + rope_dim) (D + 1)
    config: mla.Config

    @classmethod
    def of(cls, layer: nn.Module) -> Latent:
        """Return `layer` as a value. Raises `UserError` for latents with a LayerNorm, which takes a mean away."""
        assert isinstance(layer, mla.Attention)
        if layer.config.norm == "layer":
            raise UserError("latents with norm 'layer' cannot be made smaller: give a model whose norm is rms or none")
        state = {
            name: value.double() if value.is_floating_point() else value for name, value in layer.state_dict().items()
        }
        return cls(state, affine(layer.down), layer.config)


def shrinks(layers: list[nn.Module], names: set[str], mechanism: str) -> bool:
    """Return whether all layers are latent attention, and are to become that again; `names`: their mechanisms."""
    return names == {mechanism} and all(type(layer) in (mla.Attention, msla.Attention) for layer in layers)


class Smaller:
    """A target of conversions, with the interface of the files in `targets/`."""

    METHODS: ClassVar[Mapping[str, bool]] = {"svd": False, "aware": True}

    @staticmethod
    def widths(source: Latent, budget: Budget) -> dict[str, Any]:
        """Return the fields of the source, with the rank that the budget has room for."""
        kept = {}
        for each in fields(source.config):
            value = getattr(source.config, each.name)
            chosen = each.name in FREE and each.name in budget.given
            if each.name not in MODELS and not chosen and (each.name in BASE or value != each.default):
                kept[each.name] = list(value) if isinstance(value, tuple) else value
        return kept | {"kv_rank": budget.choose("kv_rank", range(1, source.config.kv_rank + 1), **kept)}

    @staticmethod
    def weights(
        source: Latent, config: Any, method: str, seen: Statistics | None
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return no further fields, and the tensors of a layer whose latent has `config.kv_rank` floats."""
        R, r = source.config.kv_rank, config.kv_rank
        normed = source.config.norm == "rms"
        w = source.tensors["norm.weight"] if normed else torch.ones(R, dtype=torch.float64)
        up = torch.cat([source.tensors["k_up.weight"], source.tensors["v_up.weight"]]) * w
        latent, rotary = source.down.split([R, source.config.rope_dim])
        moment = torch.eye(R, dtype=torch.float64) if seen is None else latent @ seen.moment @ latent.T
        _, directions = low_rank(up, moment, rank=r)
        basis = torch.linalg.qr(directions.T).Q  # R r
        fitted = up @ moment @ basis @ torch.linalg.pinv(basis.T @ moment @ basis, hermitian=True)
        kept = float((basis.T @ moment @ basis).trace() / moment.trace())  # share of z's energy
        gain = math.sqrt(R / r * kept) if normed else 1.0
        k_up, v_up = (gain * fitted).split([len(source.tensors["k_up.weight"]), len(source.tensors["v_up.weight"])])
        down = torch.cat([basis.T @ latent, rotary])
        tensors = dict(source.tensors) | {"down.weight": down[:, :-1], "k_up.weight": k_up, "v_up.weight": v_up}
        if normed:
            tensors["norm.weight"] = torch.ones(r, dtype=torch.float64)
        if "down.bias" in tensors:
            tensors["down.bias"] = down[:, -1]
        return {}, tensors
