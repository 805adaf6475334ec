"""Causal evidence: what happens to in-context learning when one head stops saying anything about its input.

Mean ablation: what a head hands to the output matrix is replaced by its mean over all tokens and sequences, so later
layers see typical values (unlike zeros). Measured is the loss on the second half of repeated random tokens, the only
place where the context tells what comes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import UserError
from ..model import Decoder
from ..results import Ablation
from ..stats import t_quantile
from .capture import heads_replaced, watch
from .scores import lengths, repeated


@torch.no_grad()
def ablate(
    model: Decoder,
    *,
    sequences: int = 64,
    segment: int | None = None,
    seed: int = 0,
    batch_size: int = 16,
    tell: Callable[[str, int, int], None] = lambda what, done, of: None,
) -> Ablation:
    """Mean-ablate each head of `model` in turn. `segment` None: half of the context, at most 128 tokens."""
    config = model.config
    segment = lengths(config, None if segment is None else [segment])[-1]
    if sequences < 2:
        raise UserError(
            f"{sequences} sequences were asked for: give at least 2, and 64 for results that mean something"
        )
    training, device = model.training, next(model.parameters()).device
    model.eval()
    tokens = repeated(config.vocab_size, sequences, segment, seed).to(device)
    batches = tokens.split(batch_size)
    blocks = model.blocks()
    means = _means(model, batches)
    whole = losses(model, batches)
    change, interval = [], []
    for layer, mean in enumerate(means):
        rows = []
        for head in range(mean.shape[0]):

            def silence(wrote: Tensor, head: int = head, mean: Tensor = mean) -> Tensor:
                wrote = wrote.clone()
                wrote[:, :, head] = mean[head].to(wrote.dtype)
                return wrote

            with heads_replaced(model, layer, silence):
                rows.append((losses(model, batches) - whole)[:, segment:].mean(1))
            tell("ablating heads", layer * mean.shape[0] + head + 1, len(blocks) * mean.shape[0])
        change.append([row.mean().item() for row in rows])
        half = t_quantile(0.95, sequences - 1) / math.sqrt(sequences)
        interval.append(
            [[r.mean().item() - half * r.std().item(), r.mean().item() + half * r.std().item()] for r in rows]
        )
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


def _means(model: Decoder, batches: tuple[Tensor, ...]) -> list[Tensor]:
    """What each head of each layer hands on, on average: N V."""
    sums: list[Tensor] = []
    for batch in batches:
        with watch(model) as layers:
            model(batch)
        parts = [layer.wrote.double().sum((0, 1)) for layer in layers]
        sums = [a + b for a, b in zip(sums, parts, strict=True)] if sums else parts
    count = sum(batch.numel() for batch in batches)
    return [total / count for total in sums]


def losses(model: Decoder, batches: tuple[Tensor, ...]) -> Tensor:
    """Nats of each token but the first: B (2n - 1), float64. Column i is the loss of the token at position i + 1."""
    found = []
    for batch in batches:
        logits, _ = model(batch)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten(), reduction="none")
        found.append(loss.view(len(batch), -1).double().cpu())
    return torch.cat(found)
