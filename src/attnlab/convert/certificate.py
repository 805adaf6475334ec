"""Certificate of a conversion: both models compared on text that neither has seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..model import Decoder
from ..results import Record, Tell
from ..spec import CAUSAL
from .calibration import record_inputs

EXACT = 1e-9  # logits that differ by less than this, in float64, are the same function


@dataclass(frozen=True, kw_only=True)
class Certificate(Record):
    """Findings of a conversion, both models in float64. Losses are in nats per token."""

    source: str  # mechanisms, joined by +
    target: str  # mechanism
    method: str
    rank: int | float | None  # as asked for
    per_layer: bool = False
    exact: bool  # `max_logit_difference` is below 1e-9
    max_logit_difference: float
    layer_errors: list[float]  # |new - old| / |old| of each layer's attention output, on what the source's layer reads
    loss_before: float | None = None  # None: no text was given
    loss_after: float | None = None
    cache_bytes_before: int  # of one sequence of `context` tokens
    cache_bytes_after: int
    context: int  # tokens
    tokens: int  # compared
    calibration_tokens: int = 0
    held_out: bool  # False: the tokens are random, because no text was given
    options: dict[str, Any] = field(default_factory=dict)  # of the new model

    @property
    def cache_share(self) -> float:
        """The size of the new cache, as a share of the old one."""
        return self.cache_bytes_after / self.cache_bytes_before


@torch.no_grad()
def compare_models(source: Decoder, target: Decoder, batches: Sequence[Tensor], tell: Tell) -> dict[str, Any]:
    """Return the measured fields. `batches` are token ids (B T), whose last column is only predicted."""
    difference = 0.0
    losses: tuple[list[Tensor], list[Tensor]] = [], []
    lost = torch.zeros(len(source.layers)).double()
    size = torch.zeros(len(source.layers)).double()
    for done, batch in enumerate(batches):
        tell("comparing", done, len(batches))
        tokens = batch[:, :-1]
        wanted = batch[:, 1:].flatten()
        with record_inputs(source) as inputs:
            before = source(tokens)[0]
        after = target(tokens)[0]
        difference = max(difference, (before - after).abs().max().item())
        for each, logits in zip(losses, (before, after), strict=True):
            each.append(F.cross_entropy(logits.flatten(0, 1), wanted, reduction="sum"))
        positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
        mask = CAUSAL
        for i, (old, new, x) in enumerate(zip(source.blocks(), target.blocks(), inputs, strict=True)):
            mask = mask.handed()
            y = old.attention(x, positions)[0]
            lost[i] += (new.attention(x, positions, None, mask)[0] - y).square().sum()
            size[i] += y.square().sum()
    count = sum(batch[:, 1:].numel() for batch in batches)
    loss_before, loss_after = (torch.stack(each).sum().item() / count for each in losses)
    return {
        "exact": difference < EXACT,
        "max_logit_difference": difference,
        "layer_errors": (lost / size).sqrt().tolist(),
        "loss_before": loss_before,
        "loss_after": loss_after,
        "tokens": count,
    }
