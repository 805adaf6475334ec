"""Torch mathematics that mechanisms share. `attend` is the one door to `kernels/`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from . import kernels, recording
from .kernels import reference
from .kernels.pairs import Pairs, one_row
from .layers import Linear as Linear  # a mechanism takes all it needs from here
from .layers import linear as linear
from .spec import CAUSAL, UNSCALED, Mask, RopeScaling


def rope(
    x: Float[Tensor, "B L N H"],
    positions: Int[Tensor, "B L"],
    theta: float | None,
    places: Sequence[float] = (),
    scaling: RopeScaling = UNSCALED,
) -> Float[Tensor, "B L N H"]:
    """Turn each pair (x[i], x[i + H/2]) by the angle position / theta^place[i]. `theta` None: x as it is.

    Left out, the places are spread evenly, 2i/H, and scaled; given, they are taken as they are. Su et al. 2021 (arXiv
    2104.09864), with the half-split pairs of GPT-NeoX and Llama.
    """
    if theta is None:
        return x
    half = x.shape[-1] // 2
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32  # bfloat16 angles are wrong after 256 tokens
    if places:
        frequency = theta ** -torch.tensor(places, device=x.device, dtype=exact)
    else:
        frequency = frequencies(half, theta, scaling, exact, x.device)
    angle = one_row(positions)[..., None, None] * frequency
    cos, sin = angle.cos(), angle.sin()
    if scaling.magnitude != 1:
        cos, sin = cos * scaling.magnitude, sin * scaling.magnitude
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def frequencies(
    pairs: int,
    theta: float,
    scaling: RopeScaling = UNSCALED,
    dtype: torch.dtype = torch.float64,
    device: torch.device | None = None,
) -> Float[Tensor, " P"]:
    """Radians per token of a head's pairs, spread evenly and then scaled."""
    frequency = theta ** (-torch.arange(pairs, device=device, dtype=dtype) / pairs)
    if scaling.kind == "none":
        return frequency
    return frequency * (1 - slowed(frequency, theta, scaling) * (1 - 1 / scaling.factor))


def slowed(frequency: Float[Tensor, " P"], theta: float, scaling: RopeScaling) -> Float[Tensor, " P"]:
    """How far each pair is slowed: 0 not at all, 1 by the whole factor."""
    if scaling.kind == "linear":
        return torch.ones_like(frequency)
    turns, slow, fast = scaling.original / math.tau, scaling.slow, scaling.fast
    if scaling.kind == "llama3":
        return ((fast - turns * frequency) / (fast - slow)).clamp(0, 1)
    half = len(frequency)
    first, last = (half * math.log(turns / times) / math.log(theta) for times in (fast, slow))
    if scaling.whole:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * half - 1)
    pair = torch.arange(half, device=frequency.device, dtype=frequency.dtype)
    return ((pair - first) / (last - first or 1e-3)).clamp(0, 1)


def attend(
    q: Float[Tensor, "B L N H"],
    k: Float[Tensor, "B S K H"],
    v: Float[Tensor, "B S K V"],
    q_pos: Int[Tensor, "B L"],
    k_pos: Int[Tensor, "B S"],
    mask: Mask = CAUSAL,
    scale: float | None = None,
    *,
    impl: str = "sdpa",
    dropout: float = 0.0,
    keep: Tensor | None = None,
) -> Float[Tensor, "B L N V"]:
    """Softmax attention. Query head n reads key/value head n // (N/K); a key at position -1 does not exist; a query
    that sees nothing gives 0. `scale` None: H^-0.5. `keep` (B|1 N|1 L S, bool) narrows what the mask allows."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    pairs = Pairs(mask, q_pos, k_pos, keep)
    if recording.wants_maps():
        recording.add_map(reference.weights(q, k, pairs, scale), q_pos, k_pos)
    return kernels.get(impl)(q, k, v, pairs, scale, dropout)


def attention_weights(
    q: Tensor, k: Tensor, q_pos: Tensor, k_pos: Tensor, mask: Mask, scale: float, *, keep: Tensor | None = None
) -> Float[Tensor, "B N L S"]:
    """The weights that `attend` would use."""
    return reference.weights(q, k, Pairs(mask, q_pos, k_pos, keep), scale)


def ema(
    x: Float[Tensor, "B L D"], decay: Float[Tensor, " D"], positions: Int[Tensor, "B L"], start: Tensor | None = None
) -> Float[Tensor, "B L D"]:
    """m[t] = decay m[t-1] + (1 - decay) x[t] from m = `start` (B D; None: 0); a token at position -1 passes m on.

    A scan in two levels, never a loop over tokens: within groups of 16 a cumulative sum of x[t] / decay^t, whose range
    stays small because decay is held above 0.05; between groups, log2(L / 16) doublings.
    """
    L, group = x.shape[1], 16
    exact = torch.promote_types(x.dtype, torch.float32)
    real = one_row(positions) >= 0
    decay = 0.05 + 0.95 * decay.to(exact)
    rest = -L % group
    x = x.to(exact).masked_fill(~real[..., None], 0) * (1 - decay)
    x = pad(x, (0, 0, 0, rest)).unflatten(1, (-1, group))
    age = pad(real, (0, rest)).unflatten(1, (-1, group)).cumsum(2)[..., None] * decay.log()
    fall = age.exp()
    within = (x * (-age).exp()).cumsum(2) * fall
    # each group as a map m -> factor m + shift; compose neighbours until every group knows all before it
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
    """Sums of x over chunks of `chunk` positions: of each chunk touched, its number (-1 where its last token has not
    come), and the sum of the chunk still open. Without `carried`, the open sum of what came before (B D), nothing came
    before, and a chunk whose head is missing does not count."""
    L, row = x.shape[1], one_row(positions)
    real, far = row >= 0, torch.iinfo(torch.int64).max // 2
    start = torch.where(real, row, far).amin(1, keepdim=True)
    first = torch.where(start < far, (start + (chunk - 1 if carried is None else 0)) // chunk, 0)
    column = torch.arange(L // chunk + 2, device=x.device)
    belongs = real[..., None] & ((row // chunk - first)[..., None] == column)
    x = x if len(row) < len(x) else x.masked_fill(~real[..., None], 0)  # 0 times what a pad may hold is not always 0
    sums = torch.einsum("blm,bld->bmd", belongs.to(x.dtype).expand(len(x), -1, -1), x)
    if carried is not None:
        sums = torch.cat([sums[:, :1] + carried.to(x.dtype)[:, None], sums[:, 1:]], 1)
    done = (row.amax(1, keepdim=True) + 1) // chunk  # the first chunk that is not complete
    still_open = sums.gather(1, (done - first).clamp(min=0)[..., None].expand(len(x), 1, x.shape[2]))[:, 0]
    return sums, torch.where(first + column < done, first + column, -1).expand(len(x), -1), still_open


def spread(best: Tensor, chunks: Int[Tensor, "B M"], wanted: Int[Tensor, "B S"]) -> Tensor:
    """What was chosen among chunks (best: B L M, bool) as a choice among tokens that lie in chunk `wanted`: B L S.
    Chunk numbers rise by one from column to column where they are not -1."""
    best, chunks = pad(best, (0, 1)), pad(chunks, (0, 1), value=-1)  # a last column for tokens of no chunk
    last = chunks.shape[1] - 1
    first = torch.where(chunks >= 0, chunks - torch.arange(last + 1, device=chunks.device), 0).amax(1, keepdim=True)
    column = wanted - first
    column = torch.where((column >= 0) & (column < last), column, last)
    return best.gather(2, column[:, None].expand(-1, best.shape[1], -1))


def index_scores(
    q: Float[Tensor, "B L J E"], k: Float[Tensor, "B S E"], weight: Float[Tensor, "B L J"]
) -> Float[Tensor, "B L S"]:
    """sum_j weight[t, j] relu(q[t, j] . k[s]), in float32 at least."""
    match = torch.einsum("blje,bse->bjls", q, k.to(q.dtype)).relu()
    return (weight.transpose(1, 2)[..., None] * match).sum(1, dtype=torch.promote_types(q.dtype, torch.float32))


def newest(scores: Float[Tensor, "*B S"], count: int) -> Tensor:
    """True for the `count` highest of the last dimension; equal ones go to the later index, so that decoding in chunks
    agrees with decoding at once. Entries of -inf are never chosen."""
    if count >= scores.shape[-1]:
        return scores > -torch.inf
    best = scores.topk(count, sorted=False).values
    least = best.amin(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
    room = (best == least).sum(-1, keepdim=True, dtype=torch.int32)  # for those that equal the least
    level = scores == least
    order = level.cumsum(-1, dtype=torch.int32)  # counted from the earliest
    return (scores > least) | (level & (order > order[..., -1:] - room))


def kl(target: Tensor, scores: Tensor, keep: Tensor, real: Tensor) -> Tensor:
    """KL(target || softmax of the scores) in nats over kept entries (all B L S), mean over the `real` rows."""
    guess = scores.masked_fill(~keep, torch.finfo(scores.dtype).min).log_softmax(-1).masked_fill(~keep, 0)
    divergence = (torch.xlogy(target, target) - target * guess).sum(-1)
    return (divergence * real).sum() / real.sum().clamp(min=1)
