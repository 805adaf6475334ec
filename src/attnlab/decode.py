"""Inference in three verbs: `prefill` reads prompts, `step` adds one token, `generate` repeats it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .cache import Cache
from .checkpoint import RunFolder, load_model
from .model import Decoder
from .spec import UserError
from .train import find_device


def prefill(
    model: Decoder, tokens: Tensor, cache: list[Cache], positions: Tensor | None = None
) -> tuple[Tensor, list[Cache]]:
    """Read prompts, tokens [B L]. Returns (the logits after the last token [B V], the cache).

    `positions` [B L] for prompts of different lengths: padding on the left, at position -1. None: no padding.
    """
    x, kept = model.hidden(tokens, positions, cache)
    assert kept is not None
    return model.head(x[:, -1]), kept  # the head on one token: the logits of a long prompt would outweigh its cache


def step(
    model: Decoder, tokens: Tensor, cache: list[Cache], positions: Tensor | None = None
) -> tuple[Tensor, list[Cache]]:
    """Add one token to each sequence, tokens [B] at `positions` [B]. Returns (the logits after it [B V], the cache)."""
    return prefill(model, tokens[:, None], cache, None if positions is None else positions[:, None])


@torch.inference_mode()
def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    n: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    on_token: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """The `n` tokens that follow each prompt, the prompt left out.

    `temperature` 0 takes the likeliest token. `top_k` and `top_p` narrow the choice, in this order. A prompt's sample
    depends on `seed` and the prompt alone, not on its neighbours; a prompt given twice gets two samples. `on_token` is
    told (number of the prompt, token) as tokens come. Raises `UserError` for an empty prompt, a token that the model
    does not know, or a length that learned positions do not reach.
    """
    _check(model, prompts, n, temperature, top_k, top_p, seed)
    if not prompts or not n:
        return [[] for _ in prompts]
    training = model.training
    model.eval()
    try:
        return [row.tolist() for row in _generate(model, prompts, n, temperature, top_k, top_p, seed, on_token)[0]]
    finally:
        model.train(training)


def _generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    n: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    on_token: Callable[[int, int], None] | None,
) -> tuple[Tensor, list[Cache]]:
    """([B n], the cache after the last step)."""
    device = next(model.parameters()).device
    tokens, positions = (part.to(device) for part in left_padded(prompts))
    lengths = positions[:, -1] + 1
    ragged = bool((positions < 0).any())
    cache = model.empty_cache(len(prompts), tokens.shape[1] + n, ragged=ragged)
    draws = uniforms(prompts, n, seed).to(device) if temperature > 0 else None
    logits, cache = prefill(model, tokens, cache, positions if ragged else None)
    out = []
    for i in range(n):
        token = choose_token(logits, None if draws is None else draws[:, i], temperature, top_k, top_p)
        out.append(token)
        if on_token is not None:
            for number, value in enumerate(token.tolist()):
                on_token(number, value)
        if i + 1 < n:
            logits, cache = step(model, token, cache, lengths + i if ragged else None)
    return torch.stack(out, 1), cache


def left_padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """(tokens, positions), int64 [B L]: rows end together; padding is token 0 at position -1."""
    width = max(map(len, prompts))
    tokens = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    padding = torch.tensor([width - len(prompt) for prompt in prompts])
    return tokens, (torch.arange(width) - padding[:, None]).clamp(min=-1)


def uniforms(prompts: Sequence[Sequence[int]], n: int, seed: int) -> Tensor:
    """[B n] float64 numbers in [0, 1), a row a function of the seed, its prompt, and how often that came before."""
    seen: Counter[tuple[int, ...]] = Counter()
    rows = []
    for prompt in map(tuple, prompts):
        entropy = np.random.SeedSequence([seed, seen[prompt], *prompt])
        rows.append(np.random.Philox(entropy).random_raw(n) >> np.uint64(11))
        seen[prompt] += 1
    return torch.from_numpy(np.stack(rows).astype(np.float64) * 2.0**-53)


def choose_token(
    logits: Tensor, draw: Tensor | None, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """[B]: where the cumulative probability of logits [B V], likeliest first, passes `draw` [B]; None: the first."""
    if draw is None or temperature == 0:
        return logits.argmax(-1)
    ordered, tokens = logits.double().sort(dim=-1, descending=True, stable=True)
    p = ((ordered - ordered[:, :1]) / temperature).softmax(-1)
    if top_k is not None:
        p[:, top_k:] = 0
    if top_p is not None:
        p = p / p.sum(-1, keepdim=True)
        p[p.cumsum(-1) - p >= top_p] = 0  # the token that reaches top_p stays, so one always does
    total = p.cumsum(-1)
    at = torch.searchsorted(total, draw[:, None] * total[:, -1:], right=True)
    likeliest_last = (p > 0).sum(-1, keepdim=True) - 1  # rounding must not step past what has probability
    return tokens.gather(-1, torch.minimum(at, likeliest_last))[:, 0]


@dataclass(frozen=True)
class Samples:
    """What `sample_run` gives: texts in the order of the prompts, prompts left out, and what it took."""

    prompts: list[str]
    texts: list[str]
    tokens: int  # generated, all prompts together
    seconds: float  # prefill and decoding, model loading left out
    tokens_per_s: float
    cache_bytes: int  # live, all prompts and layers, after the last step
    mechanism: str
    step: int  # of the checkpoint

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.inference_mode()
def sample_run(
    path: str | Path,
    prompts: Sequence[str],
    n: int = 200,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    *,
    checkpoint: int | None = None,
    device: str = "auto",
    on_text: Callable[[int, str], None] | None = None,
) -> Samples:
    """Continue `prompts` with the model in the run folder `path`; `checkpoint` is a step, None the newest.

    `on_text` is told (number of the prompt, piece of text) as it comes. Raises `UserError` as `generate` does, for a
    character that the run's tokenizer lacks, and for a folder that holds no whole run.
    """
    place = find_device(device)
    folder = RunFolder.open(path)
    tokenizer = folder.tokenizer()
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    model, config = load_model(path, checkpoint, place)
    _check(model, ids, n, temperature, top_k, top_p, seed)
    if not ids or not n:
        raise UserError(f"there are {len(ids)} prompts and {n} tokens to sample; give at least one of each")

    def tell(number: int, token: int) -> None:
        if on_text is not None:
            on_text(number, tokenizer.decode([token]))

    began = time.perf_counter()
    out, cache = _generate(model, ids, n, temperature, top_k, top_p, seed, tell if on_text else None)
    texts = [tokenizer.decode(row) for row in out.tolist()]
    seconds = time.perf_counter() - began
    return Samples(
        prompts=list(prompts),
        texts=texts,
        tokens=out.numel(),
        seconds=seconds,
        tokens_per_s=out.numel() / seconds,
        cache_bytes=sum(layer.nbytes() for layer in cache),
        mechanism=config.mechanism,
        step=checkpoint if checkpoint is not None else folder.newest() or 0,
    )


def _check(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    n: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
) -> None:
    config = model.config
    if seed < 0:
        raise UserError(f"the seed is {seed}; give a whole number from 0 up")
    if n < 0:
        raise UserError(f"{n} tokens were asked for; give 0 or more")
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature is {temperature}; give 0 (always the likeliest token) or a number above it")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k is {top_k}; give 1 or more, or leave it out")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p is {top_p}; give a share above 0 and at most 1, or leave it out")
    for number, prompt in enumerate(prompts, 1):
        if not len(prompt):
            raise UserError(f"prompt {number} is empty; give at least one token to go on from, such as a line break")
        if not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
            raise UserError(f"prompt {number} has a token outside 0 to {config.vocab_size - 1}, which the model lacks")
        if config.positions == "learned" and len(prompt) + n > config.context:
            raise UserError(
                f"prompt {number} has {len(prompt)} tokens and {n} are to follow, but this model has learned positions "
                f"for {config.context}; ask for fewer tokens, or shorten the prompt"
            )
