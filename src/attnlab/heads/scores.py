"""Head scores, with null distributions and a corrected significance.

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

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ..arguments import check_tensor
from ..config import ModelConfig
from ..errors import UserError
from ..model import Decoder
from ..ranges import Count, Seed, checked
from ..results import HeadScores, Tell
from ..stats import beyond, holm, welch
from .capture import output_matrix, watch

PATTERNS = ("previous token", "duplicate token", "induction", "first token")
CONTENT = ("duplicate token", "induction")  # scores that need a repeat, so a sequence without one is a null
SPREAD = ("entropy", "distance")
ALPHA = 0.01  # of the marks, after correction
FRESH = 8  # untrained models

Samples = dict[str, list[Tensor]]  # score -> layers -> [sequences heads], each the mean over the lengths
Scores = dict[str, list[list[float]]]  # score -> layers -> heads


@checked
def repeated(vocab_size: Count, sequences: Count, segment: Count, seed: Seed, *, repeat: bool = True) -> Tensor:
    """Return random tokens [B 2n]: a segment and its repeat or, for the null, a segment and another one.

    The first segment is the same in both cases. The tokens of a segment differ from each other where the vocabulary is
    large enough.
    """
    random = np.random.default_rng([seed, segment, sequences])

    def draw() -> np.ndarray:
        if vocab_size >= segment:
            return np.stack([random.permutation(vocab_size)[:segment] for _ in range(sequences)])
        return random.integers(0, vocab_size, (sequences, segment))

    first = draw()
    second = first if repeat else draw()
    return torch.from_numpy(np.concatenate([first, second], 1).astype(np.int64))


@checked
def pattern_scores(pattern: Tensor, segment: Count) -> dict[str, Tensor]:
    """Return every score of `PATTERNS` and `SPREAD` (B N) from patterns (B N L L).

    `segment` is the length in tokens of the part that is repeated. Entropy is in nats, distance in tokens, all other
    scores are shares of attention, which are negative where a signed pattern subtracts. Entropy and distance are those
    of the sizes of the shares.
    """
    check_tensor("pattern", pattern, "B N L L")
    sizes = pattern.abs()
    length = pattern.shape[-1]
    query = torch.arange(length, device=pattern.device)

    def weight_on(target: Tensor, asked: Tensor) -> Tensor:
        return pattern[:, :, asked, target[asked]].mean(-1)

    later = query >= 1
    second = query >= segment
    found = {
        "previous token": weight_on(query - 1, later),
        "duplicate token": weight_on(query - segment, second),
        "induction": weight_on(query - segment + 1, second),
        "first token": weight_on(torch.zeros_like(query), later),
        "entropy": -torch.xlogy(sizes, sizes).sum(-1).mean(-1),
        "distance": (sizes * (query[:, None] - query)).sum(-1).mean(-1),
    }
    return {name: score.double().cpu() for name, score in found.items()}


@torch.no_grad()
def copying_scores(model: Decoder, tokens: Tensor) -> list[Tensor]:
    """Return the copying scores of every layer (N): the share of the vocabulary that a head's own token outranks.

    Each of the `tokens` (M) is read alone. The share counts the tokens whose logit the head raises less than that of
    the token it reads; 0.5 is chance.
    """
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


@torch.no_grad()
@checked
def head_scores(
    model: Decoder,
    *,
    untrained: Iterable[Decoder] | None = None,
    sequences: Count = 64,
    segments: Sequence[Count] | None = None,
    seed: Seed = 0,
    batch_size: Count = 16,
    tell: Tell = lambda what, done, of: None,
) -> HeadScores:
    """Return the scores of every head of `model`, with both null distributions and the marks.

    `untrained`: the models of the second null; None: 8 fresh ones of the same config, which share the sequences.
    `segments`: see `segment_lengths`. Raises `UserError` for fewer than 2 sequences, a segment that does
    not fit twice into the context, and a mechanism without attention maps.
    """
    config = model.config
    device = next(model.parameters()).device
    segments = segment_lengths(config, segments)
    check_sequences(sequences)
    each = max(2, -(-sequences // FRESH))  # sequences per untrained model
    count = _Count(tell, (2 * sequences + FRESH * each) * len(segments))

    def sampled(subject: Decoder, sequences: int, repeat: bool = True) -> Samples:
        return _samples(subject, sequences, segments, seed, batch_size, repeat, count.add)

    alone = torch.from_numpy(np.random.default_rng(seed).permutation(config.vocab_size)[:512]).to(device)
    ours = sampled(model, sequences)
    not_repeated = sampled(model, sequences, repeat=False)
    copying = copying_scores(model, alone)
    fresh = []
    fresh_copying = []
    for other in fresh_models(config, seed) if untrained is None else untrained:
        other = other.to(next(model.parameters())).eval()
        fresh.append(sampled(other, each))
        fresh_copying.append(copying_scores(other, alone))
    null = _by_model(fresh)
    p = _p_values(ours, not_repeated, null)
    copying_null = [torch.stack(layer).mean(0).tolist() for layer in zip(*fresh_copying, strict=True)]
    return HeadScores(
        scores=_means(ours) | {"copying": [layer.tolist() for layer in copying]},
        not_repeated={name: means for name, means in _means(not_repeated).items() if name in CONTENT},
        untrained=_means(null) | {"copying": copying_null},
        p=p,
        marked=_marks(p),
        alpha=ALPHA,
        sequences=sequences,
        segments=list(segments),
        seed=seed,
    )


class _Count:
    """The number of sequences that have been read, reported as it grows."""

    def __init__(self, tell: Tell, total: int) -> None:
        self.tell = tell
        self.total = total
        self.done = 0

    def add(self, sequences: int) -> None:
        self.done = min(self.done + sequences, self.total)
        self.tell("scoring heads", self.done, self.total)


def _by_model(fresh: Sequence[Samples]) -> Samples:
    """Return score -> layers -> [models heads]: the means of each untrained model over its sequences."""
    assert len(fresh) > 1, "one untrained model has no spread"
    found: Samples = {}
    for name, layers in fresh[0].items():
        found[name] = [torch.stack([samples[name][i].mean(0) for samples in fresh]) for i in range(len(layers))]
    return found


def _p_values(ours: Samples, not_repeated: Samples, null: Samples) -> Scores:
    """Return the p-value of every head for every score of `PATTERNS`: the larger of its two tests'."""
    found: Scores = {}
    for name in PATTERNS:
        rows = []
        for samples, control, models in zip(ours[name], not_repeated[name], null[name], strict=True):
            row = _beyond_untrained(samples, models)
            if name in CONTENT:
                row = [max(pair) for pair in zip(row, _above_control(samples, control), strict=True)]
            rows.append(row)
        found[name] = rows
    assert all(math.isfinite(p) for rows in found.values() for p in itertools.chain(*rows))
    return found


def _beyond_untrained(samples: Tensor, models: Tensor) -> list[float]:
    """Return one p-value per head: its mean over the samples (B N) against untrained models (M N)."""
    null = models.tolist()
    return [beyond(samples[:, head].mean().item(), null) for head in range(samples.shape[1])]


def _above_control(samples: Tensor, control: Tensor) -> list[float]:
    """Return one p-value per head: its samples (B N) against those of sequences without a repeat (B N)."""
    return [welch(samples[:, head].tolist(), control[:, head].tolist()) for head in range(samples.shape[1])]


def _marks(p: Mapping[str, list[list[float]]]) -> dict[str, list[list[bool]]]:
    """Return which p-values are significant at `ALPHA` after Holm's correction, in the shape of `p`."""
    rows = [row for layers in p.values() for row in layers]
    significant = holm([value for row in rows for value in row], ALPHA)
    found: dict[str, list[list[bool]]] = {name: [] for name in p}
    start = 0
    for name, layers in p.items():
        for row in layers:
            found[name].append(significant[start : start + len(row)])
            start += len(row)
    return found


def check_sequences(sequences: int) -> None:
    """Raise `UserError` for fewer than 2 sequences, of which no spread can be taken."""
    if sequences < 2:
        raise UserError(
            f"{sequences} sequences were asked for: give at least 2, and 64 for results that mean something"
        )


def segment_lengths(config: ModelConfig, given: Sequence[int] | None = None) -> list[int]:
    """Return the lengths of the segment in tokens, ascending.

    `given` None: half of the context, at most 128, and a half and a quarter of that, as far as they reach 4 tokens.
    Raises `UserError` where one is below 2, or does not fit twice into the context.
    """
    if given is None:
        longest = min(config.context // 2, 128)
        given = [n for n in (longest // 4, longest // 2, longest) if n >= 4]
    if not given or min(given) < 2 or 2 * max(given) > config.context:
        asked = f"segments of {', '.join(map(str, given))} tokens" if given else "a segment of at least 4 tokens"
        remedy = f"segments from 2 to {config.context // 2}" if config.context >= 4 else "a model with a longer one"
        raise UserError(
            f"{asked}, each repeated once, must fit into the context of this model, which is {config.context}: give "
            f"{remedy}"
        )
    return sorted(set(given))


def fresh_models(config: ModelConfig, seed: int) -> Iterator[Decoder]:
    """Yield untrained models of `config`, one at a time, so that large ones need not fit into memory together."""
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
    """Return the scores of `count` sequences of every length in `segments`.

    Each sample is the mean over one sequence of every length, so that lengths do not add to the spread.
    """
    training = model.training
    device = next(model.parameters()).device
    model.eval()
    by_length = []
    for segment in segments:
        batches: list[list[dict[str, Tensor]]] = []  # batches -> layers -> scores
        for part in repeated(model.config.vocab_size, count, segment, seed, repeat=repeat).split(batch_size):
            with watch(model) as layers:
                model(part.to(device))
            batches.append([pattern_scores(layer.shares(), segment) for layer in layers])
            read(len(part))
        by_length.append(_joined(batches))
    model.train(training)
    found: Samples = {}
    for name in by_length[0]:
        by_layer = zip(*(samples[name] for samples in by_length), strict=True)
        found[name] = [torch.stack(layer).mean(0) for layer in by_layer]
    return found


def _joined(batches: Sequence[Sequence[Mapping[str, Tensor]]]) -> Samples:
    """Return the scores of several batches (batches -> layers -> scores) as those of one."""
    layers = list(zip(*batches, strict=True))
    return {name: [torch.cat([part[name] for part in layer]) for layer in layers] for name in (*PATTERNS, *SPREAD)}


def _means(found: Samples) -> Scores:
    return {name: [layer.mean(0).tolist() for layer in layers] for name, layers in found.items()}


def mean_scores(
    model: Decoder, *, sequences: int, segments: Sequence[int], seed: int, batch_size: Count = 16
) -> Scores:
    """Return the scores of `PATTERNS` and `SPREAD` without a null: score -> layers -> heads."""
    return _means(_samples(model, sequences, segments, seed, batch_size))
