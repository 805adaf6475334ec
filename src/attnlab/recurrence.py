"""Recurrences whose state is a matrix per head, in PyTorch: `recur`, and `short_conv` that goes before it.

`recur` is to them what `ops.attend` is to softmax attention. A state has the same size after any number of tokens.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import recording
from .arguments import check_tensor
from .errors import UserError, choose, quoted
from .kernels.pairs import one_row
from .ranges import Count, Total, checked
from .scan import Parts, chunk_size, chunked, recurrent

MODES = ("auto", "chunked", "recurrent", "fla")
LARGEST = 4096  # tokens of a chunk; its matrices are of this size squared
NEVER = -1e3  # a log decay whose exponential is 0, in float64 too: below it nothing changes
TINY = torch.finfo(torch.float32).tiny


def recur(  # noqa: PLR0913  # the one interface of all forms
    q: Float[Tensor, "B L K H"],
    k: Float[Tensor, "B L K H"],
    v: Float[Tensor, "B L N V"],
    decay: Tensor | None = None,
    beta: Float[Tensor, "B L N"] | None = None,
    *,
    positions: Int[Tensor, "B L"],
    start: Float[Tensor, "B N H V"] | None = None,
    mode: str = "auto",
    chunk: int = 64,
    normalised: bool = False,
) -> tuple[Float[Tensor, "B L N V"], Float[Tensor, "B N H V"]]:
    """Return y[t] = S[t]^T q[t] for every token, and the last S. Head n reads query and key head n // (N/K).

        S[t] = a[t] S[t-1] + k[t] v[t]^T                                          without beta
        S[t] = a[t] S[t-1] + b[t] k[t] (v[t] - (a[t] S[t-1])^T k[t])^T            with beta: the delta rule

    `decay`: log a, at most 0; B L N, or B L N H for one rate per key channel; None: a = 1. S begins as `start` (None:
    0). A token at position -1 leaves S as it was and gives 0, whatever it holds. S is computed in float32 at least.
    `mode`: "recurrent" goes token by token and is the specification; "chunked" takes `chunk` tokens at a time, rounded
    down to a power of two; "auto" is recurrent for one token; "fla" is the kernel of the package of that name, on a
    GPU. `normalised` (without beta, for keys and queries that are not negative): y is divided by the sum of its
    weights, which S carries as one more column: B N H V+1. Raises `UserError` for arguments that do not fit, and where
    a kernel is not there.
    """
    check_recurrence(q, k, v, decay, beta, positions)
    if not isinstance(normalised, bool):
        raise UserError(f"normalised is {quoted(normalised)}: it must be true or false")
    check_form(mode, chunk, normalised and beta is not None)
    values = v
    if normalised:
        v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    shape = (len(q), v.shape[2], q.shape[3], v.shape[3])
    if start is not None and not (isinstance(start, Tensor) and tuple(start.shape) == shape):
        found = tuple(start.shape) if isinstance(start, Tensor) else quoted(start)
        raise UserError(f"start is {found}: give the state of an earlier call, a tensor {shape}, or None")
    with full_precision(q.device):
        parts = _parts(q, k, v, decay, beta, positions, start)
        weights = _weights(parts, chunk, normalised) if recording.wants_maps() else None
        y, state = _form(mode, q.shape[1])(parts, chunk)
    if normalised:
        y = _divided(y)
    y = y.flatten(1, 2).transpose(1, 2).to(v.dtype)
    if weights is not None:
        recording.add_map(weights, recording.Attended(positions, positions, values, y))
    return y, state.reshape(shape)


def _form(mode: str, tokens: int) -> Callable[[Parts, int], tuple[Tensor, Tensor]]:
    if mode == "fla":
        return _fla
    return chunked if chunks_of(mode, tokens) else recurrent


def chunks_of(mode: str, tokens: int) -> bool:
    """Return whether so many tokens are computed in chunks."""
    return tokens > 1 if mode == "auto" else mode != "recurrent"


def _weights(parts: Parts, chunk: int, normalised: bool) -> Tensor:
    """Return W, B N L L, with y[t] = sum_s W[t, s] v[s] plus what the first state gives: what values that are all zero
    but for a one give. Which earlier token a state has its part from cannot be told."""
    B, K, G, L = parts.v.shape[:4]
    unit = torch.eye(L, dtype=parts.v.dtype, device=parts.v.device)
    v = torch.cat([unit, unit.new_ones(L, 1)], -1) if normalised else unit
    empty = unit.new_zeros(*parts.state.shape[:-1], L)
    start = torch.cat([empty, parts.state[..., -1:]], -1) if normalised else empty
    with torch.no_grad():
        y, _ = chunked(parts._replace(v=v.expand(B, K, G, L, -1), state=start), chunk)
    return (_divided(y) if normalised else y).flatten(1, 2)


def _divided(y: Tensor) -> Tensor:
    """Return y without its last column, divided by it; 0 where that is 0."""
    return y[..., :-1] / y[..., -1:].clamp(min=TINY)


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Let autocast narrow nothing while the context is open."""
    kinds = ("cpu", "cuda") if device.type == "meta" else (device.type,)  # on meta stands what will be on either
    with contextlib.ExitStack() as stack:
        for kind in kinds:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def has_pads(positions: Tensor) -> bool:
    """Return whether a token may be at position -1. Where looking would be slow, one row expanded has none."""
    if positions.device.type == "cpu" and not torch.compiler.is_compiling():
        return bool((one_row(positions) < 0).any())
    return positions.stride(0) != 0


def _parts(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None, positions: Tensor, start: Tensor | None
) -> Parts:
    K = q.shape[2]
    exact = torch.promote_types(v.dtype, torch.float32)
    gone = (one_row(positions) < 0)[:, None, None, :, None] if has_pads(positions) else None

    def laid(t: Tensor) -> Tensor:
        """B L N X -> B K G L X"""
        t = t.to(exact).transpose(1, 2).unflatten(1, (K, -1))
        return t if gone is None else t.masked_fill(gone, 0)

    if decay is None:
        decay = v.new_zeros(1, 1, 1, 1).expand(*v.shape[:3], 1)
    elif decay.ndim == 3:
        decay = decay[..., None]
    if start is None:
        state = torch.zeros(len(q), v.shape[2], q.shape[3], v.shape[3], dtype=exact, device=v.device)
    else:
        state = start.to(exact)
    strength = None if beta is None else laid(beta[..., None])
    fall = laid(decay).clamp(min=NEVER)
    return Parts(laid(q), laid(k), laid(v), fall, strength, state.unflatten(1, (K, -1)), v.dtype)


def _fla(parts: Parts, _: int) -> tuple[Tensor, Tensor]:
    """Run a kernel of the package flash-linear-attention. It has not been run or measured on a machine of ours."""
    check_fla(parts.v.device)
    B, K, G, L = parts.v.shape[:4]
    heads = K if parts.beta is not None else K * G  # simple_gla has no shared heads

    def laid(t: Tensor, heads: int) -> Tensor:
        """B K G|1 L X -> B L heads X"""
        return t.expand(B, K, heads // K, L, -1).flatten(1, 2).transpose(1, 2).contiguous()

    q, k, v = (laid(t, n).to(parts.dtype) for t, n in ((parts.q, heads), (parts.k, heads), (parts.v, K * G)))
    decay = laid(parts.decay, K * G).float()
    options = {"scale": 1.0, "initial_state": parts.state.flatten(1, 2).float(), "output_final_state": True}
    if parts.beta is None:
        if decay.shape[-1] > 1:
            raise UserError("fla has no kernel here for a decay per channel without beta: give mode 'chunked'")
        from fla.ops.simple_gla import chunk_simple_gla

        y, state = chunk_simple_gla(q=q, k=k, v=v, g=decay[..., 0], **options)
    else:
        beta = laid(parts.beta, K * G)[..., 0].to(parts.dtype)
        if decay.shape[-1] > 1:
            from fla.ops.kda import chunk_kda

            y, state = chunk_kda(q=q, k=k, v=v, g=decay, beta=beta, **options)
        else:
            from fla.ops.gated_delta_rule import chunk_gated_delta_rule

            y, state = chunk_gated_delta_rule(q=q, k=k, v=v, g=decay[..., 0], beta=beta, **options)
    return y.to(parts.v.dtype).transpose(1, 2).unflatten(1, (K, G)), state.to(parts.v.dtype)


def check_fla(device: torch.device) -> None:
    """Raise `UserError` where the kernels of fla cannot run: the package is missing, or the device is no GPU."""
    if device.type != "cuda":
        raise UserError(f"the kernels of fla run on a GPU and the tensors are on {device.type}: choose another impl")
    if importlib.util.find_spec("fla") is None:
        raise UserError("the kernels of fla need the package flash-linear-attention: pip install 'attnlab[fla]'")


def check_recurrence(q: Any, k: Any, v: Any, decay: Any, beta: Any, positions: Any) -> None:
    """Raise `UserError` where the arguments of `recur` are no tensors of these shapes, or do not fit together."""
    for name, value, shape in (("q", q, "B L K H"), ("k", k, "B L K H"), ("v", v, "B L N V")):
        check_tensor(name, value, shape)
    check_tensor("positions", positions, "B L", whole=True)
    if decay is not None:
        channels = isinstance(decay, Tensor) and decay.ndim == 4
        check_tensor("decay", decay, "B L N H" if channels else "B L N")
    if beta is not None:
        check_tensor("beta", beta, "B L N")
    B, L, K, H = q.shape
    N = v.shape[2]
    fits = k.shape == q.shape and v.shape[:2] == positions.shape == (B, L)
    if not fits or not L or K < 1 or N < 1 or N % K or not H:
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in (("q", q), ("k", k), ("v", v)))
        raise UserError(
            f"{shapes} and positions {tuple(positions.shape)} do not fit together: give q and k B L K H, v B L N V and "
            "positions B L, with N a multiple of K and at least one token"
        )
    if decay is not None and tuple(decay.shape) not in ((B, L, N), (B, L, N, H)):
        raise UserError(f"decay is {tuple(decay.shape)}: give {(B, L, N)}, {(B, L, N, H)}, or None for no decay")
    if beta is not None and tuple(beta.shape) != (B, L, N):
        raise UserError(f"beta is {tuple(beta.shape)}: give {(B, L, N)}, or None for no delta rule")


def check_form(mode: Any, chunk: Any, both: bool = False) -> None:
    """Raise `UserError` for an unknown mode, a chunk that cannot be, and a normalised delta rule (`both`)."""
    choose("mode", mode, MODES)
    check_chunk(chunk)
    if both:
        raise UserError("normalised and beta were given: the delta rule has no sum of weights to divide by; give one")


def check_chunk(chunk: Any) -> None:
    """Raise `UserError` where `chunk` is no number of tokens that a chunk can have."""
    whole = isinstance(chunk, int) and not isinstance(chunk, bool)
    if not whole or not 1 <= chunk <= LARGEST:
        raise UserError(f"chunk is {quoted(chunk)}: give a number of tokens from 1 to {LARGEST}, such as 64")


@checked
def recur_flops(  # noqa: PLR0913  # what the arguments of `recur` say
    tokens: Total,
    heads: Count,
    head_dim: Count,
    v_dim: Count,
    *,
    shared: Count | None = None,
    delta: bool = False,
    by_channel: bool = False,
    mode: str = "auto",
    chunk: int = 64,
) -> int:
    """Return the FLOPs of `recur` for one sequence: two per multiply-add of its matrix products, as counters see them.

    `heads` N, `shared` K (None: N), `head_dim` H, `v_dim` V (V + 1 where normalised). A product of a column with a row,
    which adds nothing up, is none.
    """
    check_form(mode, chunk)
    H, V = head_dim, v_dim
    if not chunks_of(mode, tokens):
        return 2 * tokens * heads * H * V * (2 if delta else 1)
    C = chunk_size(chunk, tokens)
    matrices = 2 if delta else 1  # q k^T and k k^T
    if by_channel and H > 1:
        scores = heads * matrices * H * max(C - 2, 0)
    else:
        scores = (heads if shared is None else shared) * matrices * 2 * C * H
    each = 4 * H * V + 2 * C * V  # the state read and written, and the tokens of the chunk
    if delta:
        each += 2 * max(C * C - 4, 0) // 3 + 2 * C * (H + V) + 2 * H * V
    return -(-tokens // C) * C * (scores + heads * each)


def short_conv(
    x: Float[Tensor, "B L D"],
    taps: Float[Tensor, "T D"],
    positions: Int[Tensor, "B L"],
    past: Float[Tensor, "B T-1 D"] | None = None,
) -> tuple[Float[Tensor, "B L D"], Float[Tensor, "B T-1 D"]]:
    """Return y[t] = sum_i taps[i] x[t - T + 1 + i] for each channel, and the last T - 1 inputs, which the next call
    takes as `past` (None: zeros).

    A token at position -1 is left out, as if its neighbours stood side by side; what it holds does not matter.
    """
    check_tensor("x", x, "B L D")
    check_tensor("taps", taps, "T D")
    check_tensor("positions", positions, "B L", whole=True)
    B, L, D = x.shape
    T = len(taps)
    if taps.shape[1] != D or T < 1 or positions.shape != (B, L):
        raise UserError(
            f"x {tuple(x.shape)}, taps {tuple(taps.shape)} and positions {tuple(positions.shape)} do not fit together: "
            "give x B L D, taps T D and positions B L"
        )
    past = x.new_zeros(B, T - 1, D) if past is None else past
    if not isinstance(past, Tensor) or tuple(past.shape) != (B, T - 1, D):
        found = tuple(past.shape) if isinstance(past, Tensor) else quoted(past)
        raise UserError(f"past is {found}: give what an earlier call returned, a tensor {(B, T - 1, D)}, or None")
    if has_pads(positions):
        return _conv_between_pads(x, taps, positions, past.to(x.dtype))
    line = torch.cat([past.to(x.dtype), x], 1)
    return _Convolution.apply(line, taps), line[:, L:]


class _Convolution(torch.autograd.Function):
    """The taps over a line (B T-1+L D), added up in float32 at least."""

    @staticmethod
    def forward(ctx: Any, line: Tensor, taps: Tensor) -> Tensor:
        ctx.save_for_backward(line, taps)
        L = line.shape[1] - len(taps) + 1
        given = torch.promote_types(line.dtype, taps.dtype)
        exact = torch.promote_types(given, torch.float32)
        line = line.to(exact)
        weight = taps.to(exact)
        y = line[:, :L] * weight[0]
        for i in range(1, len(taps)):
            y.addcmul_(line[:, i : i + L], weight[i])
        return y.to(given)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        line, taps = ctx.saved_tensors
        exact = torch.promote_types(grads[0].dtype, torch.float32)
        grad = grads[0].to(exact)
        weight = taps.to(exact)
        wide = line.to(exact)  # products of two dtypes are slow
        L = grad.shape[1]
        dline = torch.zeros_like(wide)
        dtaps = torch.empty_like(weight)
        for i in range(len(taps)):
            dline[:, i : i + L].addcmul_(grad, weight[i])
            dtaps[i] = (grad * wide[:, i : i + L]).sum((0, 1))
        return dline.to(line.dtype), dtaps.to(taps.dtype)


def _conv_between_pads(x: Tensor, taps: Tensor, positions: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
    """Move the real tokens together behind `past`, and look for each where it went."""
    B, L, D = x.shape
    T = len(taps)
    real = positions >= 0
    rank = real.cumsum(1)  # real tokens up to each
    place = torch.where(real, rank + T - 2, L + T - 1)[..., None].expand_as(x)  # pads share one more column
    line = torch.cat([past, x.new_zeros(B, L + 1, D)], 1).scatter(1, place, x)
    y = torch.zeros_like(x)
    for i in range(T):
        at = (rank - 1 + i).clamp(min=0)[..., None].expand_as(x)
        y = y + taps[i] * line.gather(1, at)
    last = rank[:, -1:] + torch.arange(T - 1, device=x.device)
    return y, line.gather(1, last[..., None].expand(-1, -1, D))
