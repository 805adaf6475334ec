"""Generation of tokens: `prefill` reads prompts, `step` adds one token, `generate` repeats it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from numbers import Integral
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from ..arguments import check_tensor
from ..cache import Cache
from ..device import check_compiler, check_room, wait_for
from ..errors import UserError, quoted
from ..model import FLOAT, Decoder, cache_floats
from ..ranges import Count, NotNegative, Part, Range, Size, check_fields, check_value, checked
from ..runs.tensors import computed

NUMBER = 8  # bytes of a random number
VARIANTS = 64  # kinds of blocks that one process may compile


def prefill(
    model: Decoder, tokens: Tensor, cache: list[Cache], positions: Tensor | None = None
) -> tuple[Tensor, list[Cache]]:
    """Read prompts, tokens [B L]. Return the logits after the last token [B V], and the cache.

    `positions` [B L] for prompts of different lengths: padding on the left, at position -1. None: no padding.
    """
    if not isinstance(model, Decoder):
        raise UserError(f"model is {quoted(model)}: give a Decoder")
    if not isinstance(cache, list):
        raise UserError(f"cache is {quoted(cache)}: give what model.empty_cache returned, or the call before this one")
    x, kept = model.hidden(tokens, positions, cache)
    assert kept is not None
    return model.head(x[:, -1]), kept  # the head on one token: the logits of a long prompt would outweigh its cache


def step(
    model: Decoder, tokens: Tensor, cache: list[Cache], positions: Tensor | None = None
) -> tuple[Tensor, list[Cache]]:
    """Add one token to each sequence, tokens [B] at `positions` [B]. Return the logits after it [B V] and the cache."""
    check_tensor("tokens", tokens, "B", whole=True)
    if positions is not None:
        check_tensor("positions", positions, "B", whole=True)
    return prefill(model, tokens[:, None], cache, None if positions is None else positions[:, None])


@dataclass(frozen=True)
class Sampling:
    """The number of tokens that follow a prompt, and the choice of each from the model's probabilities."""

    n: Size = 200  # tokens
    temperature: NotNegative = 0.8  # 0: always the likeliest token
    top_k: Count | None = None  # choose among this many likeliest tokens only; None: among all
    top_p: Part | None = None  # choose among the likeliest tokens that together have this probability; None: among all
    seed: Annotated[int, Range(0)] = 0

    def __post_init__(self) -> None:
        check_fields(self)


@checked
@torch.inference_mode()
def generate(  # noqa: PLR0913  # the public function takes the fields of Sampling one by one
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    n: Size,
    temperature: NotNegative = 1.0,
    top_k: Count | None = None,
    top_p: Part | None = None,
    seed: Annotated[int, Range(0)] = 0,
    on_token: Callable[[int, int], None] | None = None,
    *,
    stop: Collection[int] = (),
    compile: bool = False,
) -> list[list[int]]:
    """Return the `n` tokens that follow each prompt, without the prompt; fewer where one of `stop` comes and ends them.

    `temperature` 0 takes the likeliest token. `top_k` and `top_p` narrow the choice, in this order. A prompt's sample
    depends on `seed` and the prompt alone, not on its neighbours. A prompt given twice gets two samples. `on_token` is
    told (number of the prompt, token) as tokens come. `compile` runs the blocks through torch.compile, which takes up
    to a minute before the second token (benchmarks/decode.py has what it brings). Raises `UserError` for an empty
    prompt, a token that the model does not know, or a length that learned positions do not reach.
    """
    sampling = Sampling(n, float(temperature), top_k, top_p, seed)
    stop = [check_value("stop", token, Size) for token in stop]
    check_request(model, prompts, sampling)
    return continuation(model, prompts, sampling, on_token, stop=stop, compile=compile).rows


@dataclass(frozen=True)
class Continuation:
    """The tokens that follow each prompt, and what it took to make them."""

    rows: list[list[int]]
    cache: list[Cache]  # of each layer, after the last step
    steps: int
    prefill_seconds: float  # until every prompt has its first token
    step_seconds: float  # all steps together


@torch.inference_mode()
def continuation(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    on_token: Callable[[int, int], None] | None = None,
    *,
    stop: Collection[int] = (),
    compile: bool = False,
) -> Continuation:
    """Return what `generate` returns, with the cache and the times. Nothing is checked."""
    n = sampling.n
    if not prompts or not n:
        return Continuation([[] for _ in prompts], [], 0, 0.0, 0.0)
    going = set(range(len(prompts)))  # the prompts whose rows have not ended
    out = []
    device = next(model.parameters()).device
    tokens, positions = (part.to(device) for part in left_padded(prompts))
    lengths = positions[:, -1] + 1
    ragged = bool((positions < 0).any())
    draws = uniforms(prompts, n, sampling.seed).to(device) if sampling.temperature > 0 else None
    began = time.perf_counter()
    with evaluating(model):
        cache = model.empty_cache(len(prompts), tokens.shape[1] + n, ragged=ragged)
        logits, cache = prefill(model, tokens, cache, positions if ragged else None)
        with compiled(model) if compile else nullcontext():
            for i in range(n):
                token = choose_token(logits, None if draws is None else draws[:, i], sampling)
                out.append(token)
                if on_token is not None or stop:  # else no step waits for the device
                    for number in sorted(going):
                        value = int(token[number])
                        if on_token is not None:
                            on_token(number, value)
                        if value in stop:
                            going.remove(number)
                if not i:
                    wait_for(device)
                    read = time.perf_counter()
                if not going or i + 1 == n:
                    break
                logits, cache = step(model, token, cache, lengths + i if ragged else None)
    rows = [until(stop, row) for row in torch.stack(out, 1).tolist()]
    return Continuation(rows, cache, i, read - began, time.perf_counter() - read)


def until(stop: Collection[int], row: list[int]) -> list[int]:
    """Return the row up to the first token of `stop`, which is then its last."""
    return row[: next((i for i, token in enumerate(row, 1) if token in stop), None)]


@contextmanager
def evaluating(model: Decoder) -> Iterator[None]:
    """Put the model into evaluation mode inside, and back into its own mode afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def compiled(model: Decoder) -> Iterator[None]:
    """Compile the blocks and the head inside: one function for all blocks that are alike."""
    check_compiler("compile", next(model.parameters()).device)
    from torch._dynamo import config

    parts = [*model.blocks(), model.head]
    for part in parts:
        part.compile(dynamic=True)
    try:
        with config.patch(
            recompile_limit=VARIANTS, fail_on_recompile_limit_hit=True
        ):  # by default PyTorch would go on uncompiled
            yield
    finally:
        for part in parts:
            part._compiled_call_impl = None


def left_padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return tokens and positions, int64 [B L]: rows end together, and padding is token 0 at position -1."""
    width = max(map(len, prompts))
    tokens = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    padding = torch.tensor([width - len(prompt) for prompt in prompts])
    return tokens, (torch.arange(width) - padding[:, None]).clamp(min=-1)


@checked
def uniforms(prompts: Sequence[Sequence[int]], n: Size, seed: Annotated[int, Range(0)]) -> Tensor:
    """Return float64 numbers in [0, 1), [B n]. A row depends on the seed, its prompt, and earlier rows of that."""
    seen: Counter[tuple[int, ...]] = Counter()
    rows = []
    if not len(prompts):
        return torch.empty(0, n, dtype=torch.float64)
    for prompt in map(tuple, prompts):
        entropy = np.random.SeedSequence([seed, seen[prompt], *prompt])
        rows.append(np.random.Philox(entropy).random_raw(n) >> np.uint64(11))
        seen[prompt] += 1
    return torch.from_numpy(np.stack(rows).astype(np.float64) * 2.0**-53)


def choose_token(logits: Tensor, draw: Tensor | None, sampling: Sampling) -> Tensor:
    """Return tokens [B]: where the cumulative probability of logits [B V], likeliest first, passes `draw` [B].

    `draw`: numbers in [0, 1); None: the likeliest token. Raises `UserError` for logits that are not finite.
    """
    computed(logits.amax(-1))
    if draw is None or sampling.temperature == 0:
        return logits.argmax(-1)
    ordered, tokens = logits.double().sort(dim=-1, descending=True, stable=True)
    p = ((ordered - ordered[:, :1]) / sampling.temperature).softmax(-1)
    if sampling.top_k is not None:
        p[:, sampling.top_k :] = 0
    if sampling.top_p is not None:
        p = p / p.sum(-1, keepdim=True)
        p[p.cumsum(-1) - p >= sampling.top_p] = 0  # the token that reaches top_p stays, so one always does
    total = p.cumsum(-1)
    at = torch.searchsorted(total, draw[:, None] * total[:, -1:], right=True)
    likeliest_last = (p > 0).sum(-1, keepdim=True) - 1  # rounding must not step past what has probability
    return tokens.gather(-1, torch.minimum(at, likeliest_last))[:, 0]


def check_request(model: Decoder, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
    """Raise `UserError` where `generate` could not do what is asked."""
    config = model.config
    check_prompts(prompts)
    longest = max(map(len, prompts), default=0) + sampling.n
    needed = len(prompts) * (FLOAT * cache_floats(config, longest) + NUMBER * sampling.n)
    check_room(f"the cache of {longest:,} tokens", needed, "ask for fewer tokens, or fewer prompts at once")
    for number, prompt in enumerate(prompts, 1):
        if not len(prompt):
            raise UserError(f"prompt {number} is empty; give at least one token to go on from, such as a line break")
        if not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
            raise UserError(f"prompt {number} has a token outside 0 to {config.vocab_size - 1}, which the model lacks")
        if config.positions == "learned" and len(prompt) + sampling.n > config.context:
            raise UserError(
                f"prompt {number} has {len(prompt)} tokens and {sampling.n} are to follow, but this model has learned "
                f"positions for {config.context}; ask for fewer tokens, or shorten the prompt"
            )


def check_prompts(prompts: Any) -> None:
    """Raise `UserError` for anything but sequences of token ids."""
    if isinstance(prompts, str | bytes) or not isinstance(prompts, Sequence | np.ndarray | Tensor):
        raise UserError(f"prompts is {quoted(prompts)}: give a list of lists of token ids")
    for number, prompt in enumerate(prompts, 1):
        whole = isinstance(prompt, Sequence | np.ndarray | Tensor) and not isinstance(prompt, str | bytes)
        if not whole or not all(isinstance(token, Integral | Tensor) for token in prompt):
            raise UserError(f"prompt {number} is {quoted(prompt)}: give a list of token ids")
