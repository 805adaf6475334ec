"""Sparse latents: as mla, and an indexer that learns from calibration text what the dense layer attends to."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import UserError
from ...model import Decoder
from ...results import Tell
from ..calibration import record_inputs
from ..dense import Dense
from ..width import Budget
from . import mla
from .mla import METHODS, energies, weights

__all__ = ["METHODS", "energies", "finish", "weights", "widths"]

STEPS = 60  # of Adam, on the indexers alone
RATE = 3e-3  # the learning rate


def widths(source: Dense, budget: Budget) -> dict[str, Any]:
    """Return the fields of mla and of the indexer, which selects a quarter of the context if the options do not say."""
    top_k = budget.given.get("top_k", max(budget.context // 4, 1))
    sparse = {"top_k": top_k, "local": budget.given.get("local", min(4, top_k))}
    return mla.widths(source, budget.beside(sparse)) | sparse


def finish(model: Decoder, source: Decoder, batches: Sequence[Tensor], tell: Tell) -> None:
    """Train the indexers on KL(attention || indexer), on what the source's layers read.

    `batches`: token ids (B T). Raises `UserError` where there are none.
    """
    if not batches:
        raise UserError("the indexer of msla learns from text: give calibration text")
    layers = [copy.deepcopy(block.attention).float().requires_grad_(False).train() for block in model.blocks()]
    indexers = [p for layer in layers for n, p in layer.named_parameters() if n.startswith("index_")]
    optimizer = torch.optim.Adam([p.requires_grad_() for p in indexers], RATE)
    for step in range(STEPS):
        tell("teaching the indexer", step, STEPS)
        batch = batches[step % len(batches)]
        with record_inputs(source) as seen, torch.no_grad():
            source.hidden(batch)
        positions = torch.arange(batch.shape[1]).expand(batch.shape)
        with torch.enable_grad():
            for layer, x in zip(layers, seen, strict=True):
                y, _ = layer(x.float(), positions)
                (0 * y.sum()).backward()  # the only gradient is that of the indexer's loss, which is attached to y
        optimizer.step()
        optimizer.zero_grad()
    for block, layer in zip(model.blocks(), layers, strict=True):
        trained = {name: value for name, value in layer.state_dict().items() if name.startswith("index_")}
        block.attention.load_state_dict(trained, strict=False)
        block.attention.get_buffer("calls").fill_(layer.config.warmup)  # the warm-up with dense attention is over
