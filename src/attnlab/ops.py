"""Mathematics that mechanisms share, in PyTorch. `attend` is the only caller of `kernels/`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from . import kernels, recording
from .arguments import check_count, check_device, check_tensor, check_theta
from .errors import UserError, quoted
from .kernels import reference
from .kernels.pairs import Pairs, Scoring, one_row
from .ranges import HUGE
from .spec import CAUSAL, UNSCALED, Mask, RopeScaling


def rope(
    x: Float[Tensor, "B L N H"],
    positions: Int[Tensor, "B L"],
    theta: float | None,
    places: Sequence[float] = (),
    scaling: RopeScaling = UNSCALED,
) -> Float[Tensor, "B L N H"]:
    """Return x with each pair (x[i], x[i + H/2]) turned by position / theta^place[i] radians. `theta` None: x as it is.

    Su et al. 2021 (arXiv 2104.09864), with the pairs of GPT-NeoX and Llama: i and i + H/2. Without `places` they are
    spread evenly, 2i/H, and slowed by `scaling`. Given places are used as they are.
    """
    check_tensor("x", x, "B L N H")
    check_tensor("positions", positions, "B L", whole=True)
    if positions.shape[1] != x.shape[1] or len(positions) not in (1, len(x)):
        raise UserError(f"positions has the shape {tuple(positions.shape)}: give {tuple(x.shape[:2])}, as of x")
    if theta is None:
        return x
    theta = check_theta(theta)
    if x.shape[-1] % 2:
        raise UserError(f"x has heads of size {x.shape[-1]}: rotary embedding turns pairs, so give an even one")
    if not isinstance(places, tuple | list) or (places and len(places) != x.shape[-1] // 2):
        raise UserError(f"places is {quoted(places)}: give a number for each of {x.shape[-1] // 2} pairs, or none")
    if not isinstance(scaling, RopeScaling):
        raise UserError(f"scaling is {quoted(scaling)}: give a RopeScaling")
    half = x.shape[-1] // 2
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32  # bfloat16 angles are wrong after 256 tokens
    if places:
        frequency = theta ** -torch.tensor(places, device=x.device, dtype=exact)
    else:
        frequency = frequencies(half, theta, scaling, exact, x.device)
    angle = one_row(positions)[..., None, None] * frequency
    cos = angle.cos()
    sin = angle.sin()
    if scaling.magnitude != 1:
        cos = cos * scaling.magnitude
        sin = sin * scaling.magnitude
    cos = cos.to(x.dtype)
    sin = sin.to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def frequencies(
    pairs: int,
    theta: float,
    scaling: RopeScaling = UNSCALED,
    dtype: torch.dtype = torch.float64,
    device: torch.device | None = None,
) -> Float[Tensor, " P"]:
    """Return the radians per token of each pair of a head: spread evenly, then slowed by `scaling`."""
    check_count("pairs", pairs)
    theta = check_theta(theta)
    check_device(device)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise UserError(f"dtype is {quoted(dtype)}: give a floating-point type, such as torch.float32")
    if not isinstance(scaling, RopeScaling):
        raise UserError(f"scaling is {quoted(scaling)}: give a RopeScaling")
    frequency = theta ** (-torch.arange(pairs, device=device, dtype=dtype) / pairs)
    if scaling.kind == "none":
        return frequency
    return frequency * (1 - slowed(frequency, theta, scaling) * (1 - 1 / scaling.factor))


def slowed(frequency: Float[Tensor, " P"], theta: float, scaling: RopeScaling) -> Float[Tensor, " P"]:
    """Return how much each pair is slowed: from 0, not at all, to 1, by the whole factor."""
    check_tensor("frequency", frequency, "P")
    theta = check_theta(theta)
    if not isinstance(scaling, RopeScaling):
        raise UserError(f"scaling is {quoted(scaling)}: give a RopeScaling")
    if scaling.kind == "linear":
        return torch.ones_like(frequency)
    turns = scaling.original / math.tau  # of a pair over the original context, per radian per token
    if scaling.kind == "llama3":
        return ((scaling.fast - turns * frequency) / (scaling.fast - scaling.slow)).clamp(0, 1)
    half = len(frequency)
    first = half * math.log(turns / scaling.fast) / math.log(theta)  # the number of the pair that turns `fast` times
    last = half * math.log(turns / scaling.slow) / math.log(theta)
    if scaling.whole:
        first = math.floor(first)
        last = math.ceil(last)
    first = max(first, 0)
    last = min(last, 2 * half - 1)
    pair = torch.arange(half, device=frequency.device, dtype=frequency.dtype)
    return ((pair - first) / (last - first or 1e-3)).clamp(0, 1)


def attend(  # noqa: PLR0913  # the one interface of all kernels
    q: Float[Tensor, "B L N H"] | Sequence[Tensor],
    k: Float[Tensor, "B S K H"] | Sequence[Tensor],
    v: Float[Tensor, "B S K V"],
    q_pos: Int[Tensor, "B L"],
    k_pos: Int[Tensor, "B S"],
    mask: Mask = CAUSAL,
    scale: float | None = None,
    *,
    impl: str = "sdpa",
    dropout: float = 0.0,
    keep: Tensor | None = None,
    score: Callable[..., Tensor] | None = None,
    of_query: Sequence[Tensor] = (),
    of_key: Sequence[Tensor] = (),
    rest: Tensor | None = None,
    share: Tensor | float = 1.0,
) -> Float[Tensor, "B L N V"]:
    """Return softmax(q k^T scale) v over the keys that each query may see. `scale` None: H^-0.5.

    Query head n reads key/value head n // (N/K). A key at position -1 does not exist. A query that sees no key gives 0.
    `keep` (B|1 N|1 L S, bool) narrows what the mask allows.

    q and k may be sequences of parts whose scores are added; each part has its own H and its own K, and the H of the
    scale is their sum. `score(z, *of_query, *of_key)` changes the scaled scores one by one before the softmax, in
    float32 at least; its data are B|1 L N|1 for each query and B|1 S N|1 for each key. `rest` (N) is a logit that takes
    its part of the weight and adds nothing to the sum. `share` (B L N, or a number) changes no output: it is the factor
    of this answer in its layer where that adds up several, for whoever records maps.

    Raises `UserError` for an unknown `impl`, and where that kernel cannot do what is asked.
    """
    q = _parts(q)
    k = _parts(k)
    check_call(q, k, v, q_pos, k_pos)
    scale = check_rule(mask, sum(part.shape[-1] for part in q) ** -0.5 if scale is None else scale, keep)
    if keep is not None and keep.shape[2:] != (q[0].shape[1], k[0].shape[1]):
        raise UserError(f"keep has the shape {tuple(keep.shape)}: give B|1 N|1 {q[0].shape[1]} {k[0].shape[1]}")
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise UserError(f"dropout is {quoted(dropout)}: it must be at least 0 and below 1")
    if not isinstance(impl, str):
        raise UserError(f"impl is {quoted(impl)}: give one of {', '.join(kernels.NAMES)}")
    for name, given in (("of_query", of_query), ("of_key", of_key)):
        if not isinstance(given, tuple | list):
            raise UserError(f"{name} is {quoted(given)}: give a list of tensors, the data of score")
    if not isinstance(share, Tensor) and (
        isinstance(share, bool) or not isinstance(share, int | float) or not -HUGE < share < HUGE
    ):
        raise UserError(f"share is {quoted(share)}: give a number, or a tensor B L N")
    scoring = Scoring(scale, score, tuple(of_query), tuple(of_key), rest)
    if not scoring.plain or of_query or of_key:
        check_scoring(scoring, q[0], v)
    pairs = Pairs(mask, q_pos, k_pos, keep)
    y = kernels.get(impl)(q, k, v, pairs, scoring, float(dropout))
    if recording.wants_maps():
        call = recording.Attended(q_pos, k_pos, v, y, share, rest is not None)
        recording.add_map(reference.weights(q, k, pairs, scoring), call)
    return y


def _parts(heads: Any) -> tuple[Any, ...]:
    return tuple(heads) if isinstance(heads, tuple | list) else (heads,)


def check_rule(mask: Any, scale: Any, keep: Any) -> float:
    """Return the scale of logits. Raise `UserError` where these are no mask, no scale, or no choice of keys."""
    if not isinstance(mask, Mask):
        raise UserError(f"mask is {quoted(mask)}: give a Mask, such as CAUSAL")
    if keep is not None and not (isinstance(keep, Tensor) and keep.ndim == 4 and keep.dtype == torch.bool):
        raise UserError(f"keep is {quoted(keep)}: give a tensor B|1 N|1 L S of torch.bool, or None")
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not -HUGE < scale < HUGE:
        raise UserError(f"scale is {quoted(scale)}: give a finite number, or None for H^-0.5")
    return float(scale)


def check_call(q: tuple[Any, ...], k: tuple[Any, ...], v: Any, q_pos: Any, k_pos: Any) -> None:
    """Raise `UserError` where the arguments of `attend` are no tensors of these shapes, or do not fit together."""
    if len(q) != len(k) or not q:
        raise UserError(f"q has {len(q)} parts and k {len(k)}: give as many of one as of the other, at least one")
    for name, values, shape in (("q", q, "B L N H"), ("k", k, "B S K H"), ("v", (v,), "B S K V")):
        for value in values:
            check_tensor(name, value, shape)
    check_tensor("q_pos", q_pos, "B L", whole=True)
    check_tensor("k_pos", k_pos, "B S", whole=True)
    N = q[0].shape[2]
    fits = all(part.shape[:3] == (*q_pos.shape, N) for part in q)
    fits = fits and all(part.shape[:2] == k_pos.shape for part in (*k, v)) and len(q_pos) == len(k_pos)
    sized = all(a.shape[3] == b.shape[3] for a, b in zip(q, k, strict=True))
    if not fits or not sized or any(part.shape[2] < 1 or N % part.shape[2] for part in (*k, v)):
        named = [*(("q", part) for part in q), *(("k", part) for part in k), ("v", v)]
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in named)
        raise UserError(
            f"{shapes}, q_pos {tuple(q_pos.shape)} and k_pos {tuple(k_pos.shape)} do not fit together: give "
            "q B L N H, k B S K H, v B S K V, q_pos B L and k_pos B S, with N a multiple of K"
        )


def check_scoring(scoring: Scoring, q: Tensor, v: Tensor) -> None:
    """Raise `UserError` where `score`, its data or `rest` do not fit queries B L N H and values B S K V."""
    B, L, N, _ = q.shape
    for name, data, letter, tokens in (
        ("of_query", scoring.of_query, "L", L),
        ("of_key", scoring.of_key, "S", v.shape[1]),
    ):
        allowed = [(batch, tokens, heads) for batch in (1, B) for heads in (1, N)]
        for each in data:
            if not isinstance(each, Tensor) or tuple(each.shape) not in allowed:
                given = tuple(each.shape) if isinstance(each, Tensor) else quoted(each)
                raise UserError(f"{name} has {given}: give tensors B|1 {letter} N|1, here {B}|1 {tokens} {N}|1")
    if scoring.rest is not None and not (isinstance(scoring.rest, Tensor) and scoring.rest.shape == (N,)):
        given = tuple(scoring.rest.shape) if isinstance(scoring.rest, Tensor) else quoted(scoring.rest)
        raise UserError(f"rest is {given}: give a tensor of {N} logits, one for each query head, or None")
    if scoring.score is None:
        if scoring.of_query or scoring.of_key:
            raise UserError("of_query and of_key are data of score, and there is no score: give one, or leave them out")
        return
    if not callable(scoring.score):
        raise UserError(f"score is {quoted(scoring.score)}: give a function of scores and their data, or None")
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        sample = [t[:1, :1, :1, :1].detach() for t in scoring.data]
        if scoring.score(q.new_zeros(1, 1, 1, 1), *sample).requires_grad:
            raise UserError(
                "score reads a tensor that learns: give it in of_query or of_key, so that it gets a gradient"
            )


def attention_weights(
    q: Tensor, k: Tensor, q_pos: Tensor, k_pos: Tensor, mask: Mask, scale: float, *, keep: Tensor | None = None
) -> Float[Tensor, "B N L S"]:
    """Return the weights of `attend`, as the reference kernel computes them; a query that sees no key has weights 0."""
    check_call((q,), (k,), k, q_pos, k_pos)
    scale = check_rule(mask, scale, keep)
    return reference.weights((q,), (k,), Pairs(mask, q_pos, k_pos, keep), Scoring(scale))


def ema(
    x: Float[Tensor, "B L D"], decay: Float[Tensor, " D"], positions: Int[Tensor, "B L"], start: Tensor | None = None
) -> Float[Tensor, "B L D"]:
    """Return m[t] = d m[t-1] + (1 - d) x[t], d = 0.05 + 0.95 decay. m begins as `start` (B D; None: 0).

    A token at position -1 leaves m as it was. The scan has two levels and no loop over tokens. Within groups of 16 it
    is a cumulative sum of x[t] / d^t, whose range stays small because d is at least 0.05. Between groups it is
    log2(L / 16) doublings.
    """
    check_tensor("x", x, "B L D")
    check_tensor("decay", decay, "D")
    check_tensor("positions", positions, "B L", whole=True)
    if decay.shape != x.shape[2:]:
        raise UserError(f"decay has the shape {tuple(decay.shape)}: give one number for each of {x.shape[2]} features")
    if start is not None:
        check_tensor("start", start, "B D")
    L = x.shape[1]
    group = 16  # tokens
    exact = torch.promote_types(x.dtype, torch.float32)
    real = one_row(positions) >= 0
    decay = 0.05 + 0.95 * decay.to(exact)
    rest = -L % group
    x = x.to(exact).masked_fill(~real[..., None], 0) * (1 - decay)
    x = pad(x, (0, 0, 0, rest)).unflatten(1, (-1, group))
    age = pad(real, (0, rest)).unflatten(1, (-1, group)).cumsum(2)[..., None] * decay.log()
    fall = age.exp()
    within = (x * (-age).exp()).cumsum(2) * fall
    # each group is a map m -> factor m + shift; compose neighbours until each group has composed all before it
    factor, shift = fall[:, :, -1], within[:, :, -1]
    step = 1
    while step < shift.shape[1]:
        shift = torch.cat([shift[:, :step], shift[:, step:] + factor[:, step:] * shift[:, :-step]], 1)
        factor = torch.cat([factor[:, :step], factor[:, step:] * factor[:, :-step]], 1)
        step *= 2
    carry = torch.cat([torch.zeros_like(shift[:, :1]), shift[:, :-1]], 1)
    if start is not None:
        reach = torch.cat([torch.ones_like(factor[:, :1]), factor[:, :-1]], 1)
        carry = carry + reach * start.to(exact)[:, None]
    return (within + fall * carry[:, :, None]).flatten(1, 2)[:, :L]


def chunk_sums(
    x: Float[Tensor, "B L D"], positions: Int[Tensor, "B L"], chunk: int, carried: Tensor | None = None
) -> tuple[Float[Tensor, "B M D"], Int[Tensor, "B M"], Float[Tensor, "B D"]]:
    """Return the sums of x over the chunks of `chunk` positions that these tokens touch, the numbers of these chunks
    (-1 where the last token of one has not come), and the sum of the chunk that is still open.

    `carried` (B D) is the open sum that earlier tokens left. None: no token came earlier, and a chunk whose first token
    is missing does not count.
    """
    check_tensor("x", x, "B L D")
    check_tensor("positions", positions, "B L", whole=True)
    check_count("chunk", chunk)
    if carried is not None:
        check_tensor("carried", carried, "B D")
    row = one_row(positions)
    real = row >= 0
    first = _first_chunk(row, chunk, begun=carried is not None)
    column = torch.arange(x.shape[1] // chunk + 2, device=x.device)  # the most chunks that L tokens can touch
    belongs = real[..., None] & ((row // chunk - first)[..., None] == column)  # B|1 L M
    if len(row) == len(x):  # sequences have positions of their own: 0 times what a pad may hold is not always 0
        x = x.masked_fill(~real[..., None], 0)
    sums = torch.einsum("blm,bld->bmd", belongs.to(x.dtype).expand(len(x), -1, -1), x)
    if carried is not None:
        begun = sums[:, :1] + carried.to(x.dtype)[:, None]
        sums = torch.cat([begun, sums[:, 1:]], 1)
    open_chunk = (row.amax(1, keepdim=True) + 1) // chunk  # the first chunk that is not complete
    open_column = (open_chunk - first).clamp(min=0)[..., None].expand(len(x), 1, x.shape[2])
    still_open = sums.gather(1, open_column)[:, 0]
    number = first + column
    number = torch.where(number < open_chunk, number, -1).expand(len(x), -1)
    return sums, number, still_open


def _first_chunk(row: Int[Tensor, "B L"], chunk: int, *, begun: bool) -> Int[Tensor, "B 1"]:
    """The number of the first chunk that counts: the one that holds the first token where its sum has `begun` earlier,
    else the first one that is there from its first token on; 0 where there is no token."""
    far = torch.iinfo(torch.int64).max // 2
    start = torch.where(row >= 0, row, far).amin(1, keepdim=True)
    rounded = start if begun else start + chunk - 1
    return torch.where(start < far, rounded // chunk, 0)


def spread(best: Tensor, chunks: Int[Tensor, "B M"], wanted: Int[Tensor, "B S"]) -> Tensor:
    """Return a choice among chunks (best: B L M, bool) as a choice among tokens that lie in chunk `wanted`: B L S.

    Chunk numbers rise by one from column to column where they are not -1.
    """
    last = chunks.shape[1]  # the number of a column added for tokens of no chunk: it is never chosen
    best = pad(best, (0, 1))
    chunks = pad(chunks, (0, 1), value=-1)
    first = torch.where(chunks >= 0, chunks - torch.arange(last + 1, device=chunks.device), 0).amax(1, keepdim=True)
    column = wanted - first
    column = torch.where((column >= 0) & (column < last), column, last)
    return best.gather(2, column[:, None].expand(-1, best.shape[1], -1))


def index_scores(
    q: Float[Tensor, "B L J E"], k: Float[Tensor, "B S E"], weight: Float[Tensor, "B L J"]
) -> Float[Tensor, "B L S"]:
    """Return sum_j weight[t, j] relu(q[t, j] . k[s]), in float32 at least."""
    for name, value, shape in (("q", q, "B L J E"), ("k", k, "B S E"), ("weight", weight, "B L J")):
        check_tensor(name, value, shape)
    if q.shape[:3] != weight.shape or k.shape[::2] != q.shape[::3]:
        raise UserError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and weight {tuple(weight.shape)} do not fit together: give "
            "q B L J E, k B S E and weight B L J"
        )
    match = torch.einsum("blje,bse->bjls", q, k.to(q.dtype)).relu()
    return (weight.transpose(1, 2)[..., None] * match).sum(1, dtype=torch.promote_types(q.dtype, torch.float32))


def newest(scores: Float[Tensor, "*B S"], count: int) -> Tensor:
    """Return True for the `count` highest scores of the last dimension; -inf is never chosen.

    Of equal scores the later index wins, so that decoding in chunks agrees with decoding at once.
    """
    if not isinstance(scores, Tensor) or not scores.is_floating_point() or not scores.ndim:
        raise UserError(f"scores is {quoted(scores)}: give a tensor *B S of floating-point numbers")
    check_count("count", count)
    if count >= scores.shape[-1]:
        return scores > -torch.inf
    best = scores.topk(count, sorted=False).values
    least = best.amin(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
    room = (best == least).sum(-1, keepdim=True, dtype=torch.int32)  # places for scores that equal the least
    ties = scores == least
    order = ties.cumsum(-1, dtype=torch.int32)  # counted from the earliest
    return (scores > least) | (ties & (order > order[..., -1:] - room))


def kl(target: Tensor, scores: Tensor, keep: Tensor, real: Tensor) -> Tensor:
    """Return KL(target || softmax of the scores) in nats over the kept entries (B L S), mean over the `real` rows."""
    guess = scores.masked_fill(~keep, torch.finfo(scores.dtype).min).log_softmax(-1).masked_fill(~keep, 0)
    divergence = (torch.xlogy(target, target) - target * guess).sum(-1)
    return (divergence * real).sum() / real.sum().clamp(min=1)
