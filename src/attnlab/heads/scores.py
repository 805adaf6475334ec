"""What heads do, as numbers with a null distribution and a corrected significance.

Measured on sequences of random tokens, so that nothing but the pattern itself can be exploited: a segment of n tokens,
repeated once. For a query t in the second half, whose token stood at t - n before:

    previous token      weight on t - 1                                  (every t)
    duplicate token     weight on t - n, where the same token stood
    induction           weight on t - n + 1, the token that came next    (prefix matching: Olsson et al. 2022)
    first token         weight on 0                                      (every t; where attention rests)
    entropy, distance   of the pattern: nats, and mean of t - s in tokens

    copying             how far a head's output for a token alone raises the logit of that very token: its share of the
                        vocabulary that it outranks, 0.5 by chance, through the output matrix, final norm and head

Two null distributions. The same model on sequences whose second half is *not* a repeat, read at the same places: is the
mean over sequences higher with the repeat (Welch's t, one-sided)? And the heads of 8 untrained models of the same
shape: is this head further out than a ninth model's would be? Heads of one model resemble each other, so models are
counted, not heads: Student's t of 7 degrees. A mark means yes to both, at 0.01 after Holm's correction over all heads
and scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ..config import ModelConfig
from ..errors import UserError
from ..model import Decoder
from ..results import HeadScores, Tell
from ..stats import beyond, holm, welch
from .capture import output_matrix, watch

PATTERNS = ("previous token", "duplicate token", "induction", "first token")
CONTENT = ("duplicate token", "induction")  # need a repeat, so a sequence without one is a null
SPREAD = ("entropy", "distance")
ALPHA = 0.01
FRESH = 8  # untrained models


def repeated(vocab_size: int, sequences: int, segment: int, seed: int, *, repeat: bool = True) -> Tensor:
    """[B 2n] random tokens: a segment and its repeat, or (the null) another segment. Tokens of a segment differ from
    each other where the vocabulary is large enough. The first half is the same for both."""
    random = np.random.default_rng([seed, segment, sequences])

    def draw() -> np.ndarray:
        if vocab_size >= segment:
            return np.stack([random.permutation(vocab_size)[:segment] for _ in range(sequences)])
        return random.integers(0, vocab_size, (sequences, segment))

    first = draw()
    second = first if repeat else draw()
    return torch.from_numpy(np.concatenate([first, second], 1).astype(np.int64))


def pattern_scores(pattern: Tensor, segment: int) -> dict[str, Tensor]:
    """Every score of `PATTERNS` and `SPREAD` from patterns B N L L of sequences with a segment of `segment`: B N."""
    length = pattern.shape[-1]
    query = torch.arange(length, device=pattern.device)

    def weight_on(target: Tensor, asked: Tensor) -> Tensor:
        return pattern[:, :, asked, target[asked]].mean(-1)

    later, second = query >= 1, query >= segment
    found = {
        "previous token": weight_on(query - 1, later),
        "duplicate token": weight_on(query - segment, second),
        "induction": weight_on(query - segment + 1, second),
        "first token": weight_on(torch.zeros_like(query), later),
        "entropy": -torch.xlogy(pattern, pattern).sum(-1).mean(-1),
        "distance": (pattern * (query[:, None] - query)).sum(-1).mean(-1),
    }
    return {name: score.double().cpu() for name, score in found.items()}


@torch.no_grad()
def copying_scores(model: Decoder, tokens: Tensor) -> list[Tensor]:
    """Per layer N: the mean share of the vocabulary whose logit each head raises less than that of the token it reads,
    for tokens [M] each standing alone."""
    with watch(model) as layers:
        model(tokens[:, None])
    found = []
    for block, layer in zip(model.blocks(), layers, strict=True):
        matrix = output_matrix(block.attention).weight.unflatten(1, (layer.wrote.shape[2], -1))  # D N V
        written = torch.einsum("mnv,dnv->mnd", layer.wrote[:, 0], matrix)
        share = []
        for part, own in zip(written.split(64), tokens.split(64), strict=True):
            logits = model.head(_gain(model, part))  # m N vocab
            mine = logits.gather(-1, own[:, None, None].expand(-1, logits.shape[1], 1))
            ties = (logits == mine).sum(-1) - 1
            share.append(((logits < mine).sum(-1) + 0.5 * ties) / max(logits.shape[-1] - 1, 1))
        found.append(torch.cat(share).double().mean(0).cpu())
    return found


def _gain(model: Decoder, x: Tensor) -> Tensor:
    """The linear part of the final norm: what a small step along x does to what the head reads, up to one factor."""
    if isinstance(model.norm, torch.nn.LayerNorm):
        x = x - x.mean(-1, keepdim=True)
    weight: Tensor = model.norm.weight  # type: ignore[assignment]
    return x * weight


Samples = dict[str, list[Tensor]]  # score -> layers -> [sequences heads], each the mean over the lengths


@torch.no_grad()
def head_scores(
    model: Decoder,
    *,
    untrained: Iterable[Decoder] | None = None,
    sequences: int = 64,
    segments: Sequence[int] | None = None,
    seed: int = 0,
    batch_size: int = 16,
    tell: Tell = lambda what, done, of: None,
) -> HeadScores:
    """Score every head of `model`. `untrained` None: 8 fresh models of the same config, which share the sequences.

    `segments`: see `lengths`. Raises `UserError` for fewer than 2 sequences, a segment that does not fit twice into the
    context, and a mechanism without attention maps.
    """
    config, device = model.config, next(model.parameters()).device
    segments = lengths(config, segments)
    if sequences < 2:
        raise UserError(
            f"{sequences} sequences were asked for: give at least 2, and 64 for results that mean something"
        )
    each = max(2, -(-sequences // FRESH))
    done, total = 0, (2 * sequences + FRESH * each) * len(segments)

    def read(count: int) -> None:
        nonlocal done
        done = min(done + count, total)
        tell("scoring heads", done, total)

    def scored(subject: Decoder, count: int, repeat: bool = True) -> Samples:
        return _samples(subject, count, segments, seed, batch_size, repeat, read)

    alone = torch.from_numpy(np.random.default_rng(seed).permutation(config.vocab_size)[:512]).to(device)
    ours, not_repeated = scored(model, sequences), scored(model, sequences, False)
    copying = copying_scores(model, alone)
    fresh, fresh_copying = [], []
    for other in fresh_models(config, seed) if untrained is None else untrained:
        other = other.to(next(model.parameters())).eval()
        fresh.append(scored(other, each))
        fresh_copying.append(copying_scores(other, alone))
    assert len(fresh) > 1, "one untrained model has no spread"
    null = {
        name: [torch.stack([found[name][layer].mean(0) for found in fresh]) for layer in range(config.n_layers)]
        for name in ours
    }  # score -> layers -> [models heads]
    p = {
        name: [
            [
                max(
                    beyond(layer[:, head].mean().item(), null[name][number].tolist()),
                    welch(layer[:, head].tolist(), not_repeated[name][number][:, head].tolist())
                    if name in CONTENT
                    else 0.0,
                )
                for head in range(layer.shape[1])
            ]
            for number, layer in enumerate(ours[name])
        ]
        for name in PATTERNS
    }
    flat = [value for layers in p.values() for row in layers for value in row]
    assert all(math.isfinite(value) for value in flat)
    marks = iter(holm(flat, ALPHA))
    return HeadScores(
        scores=_means(ours) | {"copying": [layer.tolist() for layer in copying]},
        not_repeated={name: means for name, means in _means(not_repeated).items() if name in CONTENT},
        untrained=_means(null)
        | {"copying": [torch.stack(layer).mean(0).tolist() for layer in zip(*fresh_copying, strict=True)]},
        p=p,
        marked={name: [[next(marks) for _ in row] for row in layers] for name, layers in p.items()},
        alpha=ALPHA,
        sequences=sequences,
        segments=list(segments),
        seed=seed,
    )


def lengths(config: ModelConfig, given: Sequence[int] | None = None) -> list[int]:
    """Lengths of the segment, ascending. None: half of the context, at most 128, and a half and a quarter of that, as
    far as they reach 4 tokens. `UserError` where one is no segment, or does not fit twice into the context."""
    if given is None:
        longest = min(config.context // 2, 128)
        given = [n for n in (longest // 4, longest // 2, longest) if n >= 4]
    if not given or min(given) < 2 or 2 * max(given) > config.context:
        told = f"segments of {', '.join(map(str, given))} tokens" if given else "a segment of at least 4 tokens"
        raise UserError(
            f"{told}, each repeated once, must fit into the context of this model, which is {config.context}: give "
            + (f"segments from 2 to {config.context // 2}" if config.context >= 4 else "a model with a longer one")
        )
    return sorted(set(given))


def fresh_models(config: ModelConfig, seed: int) -> Iterator[Decoder]:
    """Untrained models, one after the other, so that large ones need not stand in memory together."""
    for number in range(FRESH):
        with torch.random.fork_rng([]):
            torch.manual_seed(FRESH * seed + number + 1)
            model = Decoder(config)
        yield model


@torch.no_grad()
def _samples(
    model: Decoder,
    count: int,
    segments: Sequence[int],
    seed: int,
    batch_size: int,
    repeat: bool = True,
    read: Callable[[int], None] = lambda count: None,
) -> Samples:
    """Each sample is the mean over one sequence of every length, so that lengths do not add to the spread."""
    training, device = model.training, next(model.parameters()).device
    model.eval()
    by_length = []
    for segment in segments:
        found: list[list[dict[str, Tensor]]] = []
        for part in repeated(model.config.vocab_size, count, segment, seed, repeat=repeat).split(batch_size):
            with watch(model) as layers:
                model(part.to(device))
            found.append([pattern_scores(layer.pattern(), segment) for layer in layers])
            read(len(part))
        by_length.append(
            {
                name: [torch.cat([part[name] for part in layer]) for layer in zip(*found, strict=True)]
                for name in (*PATTERNS, *SPREAD)
            }
        )
    model.train(training)
    return {
        name: [torch.stack(layer).mean(0) for layer in zip(*(each[name] for each in by_length), strict=True)]
        for name in by_length[0]
    }


def _means(found: Samples) -> dict[str, list[list[float]]]:
    return {name: [layer.mean(0).tolist() for layer in layers] for name, layers in found.items()}


def mean_scores(
    model: Decoder, *, sequences: int, segments: Sequence[int], seed: int, batch_size: int = 16
) -> dict[str, list[list[float]]]:
    """The patterns' scores without a null: score -> layers -> heads."""
    return _means(_samples(model, sequences, segments, seed, batch_size))
