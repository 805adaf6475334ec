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

Two null distributions: the same model on sequences whose second half is *not* a repeat, read at the same places; and an
untrained model of the same shape on the same sequences. A mark means that the score is above both, sequence by sequence
(Welch's t, one-sided), at 0.01 after Holm's correction over all heads and scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ..model import Decoder
from ..results import HeadScores
from ..spec import UserError
from ..stats import holm, welch
from .watch import output_matrix, watch

PATTERNS = ("previous token", "duplicate token", "induction", "first token")
CONTENT = ("duplicate token", "induction")  # need a repeat, so a sequence without one is a null
SPREAD = ("entropy", "distance")
ALPHA = 0.01

Tell = Callable[[str, int, int], None]  # (what, done, of)


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


def head_scores(
    model: Decoder,
    *,
    untrained: Decoder | None = None,
    sequences: int = 64,
    segments: Sequence[int] | None = None,
    seed: int = 0,
    batch_size: int = 16,
    tell: Tell = lambda what, done, of: None,
) -> HeadScores:
    """Score every head of `model`. `untrained` None: a fresh model of the same config.

    `segments`: lengths of the repeated segment; None: an eighth, a quarter and a half of the context (at most 128), as
    far as they reach 4 tokens. Raises `UserError` for fewer than 2 sequences, a segment that does not fit twice into
    learned positions, and a mechanism without attention maps.
    """
    config = model.config
    segments = _segments(model, segments)
    if sequences < 2:
        raise UserError(
            f"{sequences} sequences were asked for: give at least 2, and 64 for results that mean something"
        )
    if untrained is None:
        with torch.random.fork_rng([]):
            torch.manual_seed(seed + 1)
            untrained = Decoder(config)
    untrained = untrained.to(next(model.parameters())).eval()
    kinds = {"trained": (model, True), "not repeated": (model, False), "untrained": (untrained, True)}
    samples: dict[str, dict[str, list[list[Tensor]]]] = {
        kind: {name: [[] for _ in range(config.n_layers)] for name in (*PATTERNS, *SPREAD)} for kind in kinds
    }
    done, total = 0, len(kinds) * len(segments) * sequences
    for kind, (subject, repeat) in kinds.items():
        training = subject.training
        subject.eval()
        for segment in segments:
            tokens = repeated(config.vocab_size, sequences, segment, seed, repeat=repeat)
            for part in tokens.split(batch_size):
                _collect(subject, part, segment, samples[kind])
                done += len(part)
                tell("scoring heads", done, total)
        subject.train(training)
    stacked = {
        kind: {name: [torch.cat(layer) for layer in layers] for name, layers in found.items()}
        for kind, found in samples.items()
    }
    alone = torch.from_numpy(np.random.default_rng(seed).permutation(config.vocab_size)[:512])
    alone = alone.to(next(model.parameters()).device)
    copying = {"trained": copying_scores(model, alone), "untrained": copying_scores(untrained, alone)}
    return _summary(stacked, copying, sequences, segments, seed)


def _segments(model: Decoder, given: Sequence[int] | None) -> list[int]:
    context = model.config.context
    if given is None:
        given = sorted({n for n in (min(context // share, 128) for share in (8, 4, 2)) if n >= 4})
    if not given or min(given) < 2:
        raise UserError(f"a segment must hold at least 2 tokens and fit twice into the context, which is {context}")
    if model.config.positions == "learned" and 2 * max(given) > context:
        raise UserError(
            f"two repeats of {max(given)} tokens are longer than the {context} learned positions of this model: "
            f"give segments of at most {context // 2}"
        )
    return list(given)


@torch.no_grad()
def _collect(model: Decoder, tokens: Tensor, segment: int, into: dict[str, list[list[Tensor]]]) -> None:
    with watch(model) as layers:
        model(tokens.to(next(model.parameters()).device))
    for number, layer in enumerate(layers):
        for name, score in pattern_scores(layer.pattern(), segment).items():
            into[name][number].append(score)


def _summary(
    samples: dict[str, dict[str, list[Tensor]]],
    copying: dict[str, list[Tensor]],
    sequences: int,
    segments: Sequence[int],
    seed: int,
) -> HeadScores:
    def means(kind: str) -> dict[str, list[list[float]]]:
        found = {name: [layer.mean(0).tolist() for layer in layers] for name, layers in samples[kind].items()}
        if kind in copying:
            found["copying"] = [layer.tolist() for layer in copying[kind]]
        return found

    p = {}
    for name in PATTERNS:
        nulls = ["untrained", "not repeated"] if name in CONTENT else ["untrained"]
        p[name] = [
            [
                max(welch(ours[:, head].tolist(), samples[null][name][layer][:, head].tolist()) for null in nulls)
                for head in range(ours.shape[1])
            ]
            for layer, ours in enumerate(samples["trained"][name])
        ]
    flat = [value for layers in p.values() for row in layers for value in row]
    marks = iter(holm(flat, ALPHA))
    marked = {name: [[next(marks) for _ in row] for row in layers] for name, layers in p.items()}
    assert all(math.isfinite(value) for value in flat)
    return HeadScores(
        scores=means("trained"),
        not_repeated={n: s for n, s in means("not repeated").items() if n in CONTENT},
        untrained=means("untrained"),
        p=p,
        marked=marked,
        alpha=ALPHA,
        sequences=sequences,
        segments=list(segments),
        seed=seed,
    )
