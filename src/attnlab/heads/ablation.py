"""Mean ablation: the loss that in-context learning has without one head.

The output of the head is replaced by its mean over all tokens and sequences, so that later layers read typical values
(unlike zeros). The loss is measured on the second half of repeated random tokens, which only the context can predict.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from ..model import Decoder
from ..ranges import Count, Seed, checked
from ..results import Ablation, Tell
from ..stats import t_quantile
from .capture import heads_replaced, watch
from .scores import check_sequences, repeated, segment_lengths


@torch.no_grad()
@checked
def ablate(
    model: Decoder,
    *,
    sequences: Count = 64,
    segment: Count | None = None,
    seed: Seed = 0,
    batch_size: Count = 16,
    tell: Tell = lambda what, done, of: None,
) -> Ablation:
    """Return what mean-ablating each head of `model` in turn does to the loss, in nats per token.

    `segment`: tokens that are repeated; None: half of the context, at most 128. Raises `UserError` for fewer than 2
    sequences, and for a segment that does not fit twice into the context.
    """
    config = model.config
    segment = segment_lengths(config, None if segment is None else [segment])[-1]
    check_sequences(sequences)
    training = model.training
    device = next(model.parameters()).device
    model.eval()
    tokens = repeated(config.vocab_size, sequences, segment, seed).to(device)
    batches = tokens.split(batch_size)
    layers = len(model.blocks())
    means = _means(model, batches)
    whole = losses(model, batches)
    change = []
    interval = []
    for layer, mean in enumerate(means):
        heads = mean.shape[0]
        rows = []
        for head in range(heads):
            with heads_replaced(model, layer, partial(_silenced, head=head, mean=mean[head])):
                rows.append((losses(model, batches) - whole)[:, segment:].mean(1))
            tell("ablating heads", layer * heads + head + 1, layers * heads)
        change.append([row.mean().item() for row in rows])
        interval.append([_interval(row) for row in rows])
    model.train(training)
    by_position = whole.mean(0)
    return Ablation(
        loss_by_position=by_position.tolist(),
        first_half=by_position[: segment - 1].mean().item(),
        second_half=by_position[segment:].mean().item(),
        change=change,
        change_interval=interval,
        sequences=sequences,
        segment=segment,
        seed=seed,
    )


def _silenced(wrote: Tensor, head: int, mean: Tensor) -> Tensor:
    """Return what the heads wrote (B L N V) with one head's part replaced by `mean` (V)."""
    wrote = wrote.clone()
    wrote[:, :, head] = mean.to(wrote.dtype)
    return wrote


def _interval(row: Tensor) -> list[float]:
    """Return the 95 % interval of the mean of one value per sequence (B)."""
    half = t_quantile(0.95, len(row) - 1) / math.sqrt(len(row))
    return [row.mean().item() - half * row.std().item(), row.mean().item() + half * row.std().item()]


def _means(model: Decoder, batches: Sequence[Tensor]) -> list[Tensor]:
    """Return the mean output of each head, per layer N V."""
    sums: list[Tensor] = []
    for batch in batches:
        with watch(model) as layers:
            model(batch)
        parts = [layer.wrote.double().sum((0, 1)) for layer in layers]
        sums = [a + b for a, b in zip(sums, parts, strict=True)] if sums else parts
    count = sum(batch.numel() for batch in batches)
    return [total / count for total in sums]


def losses(model: Decoder, batches: Sequence[Tensor]) -> Tensor:
    """Return the loss in nats of each token but the first: B (2n - 1), float64.

    Column i is the loss of the token at position i + 1. `batches` are token ids (b 2n).
    """
    found = []
    for batch in batches:
        logits, _ = model(batch)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten(), reduction="none")
        found.append(loss.view(len(batch), -1).double().cpu())
    return torch.cat(found)
