"""Mistakes that show only once there are caches, padding or layers: attnlab's interface, one error each."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from attnlab.attention import cla, fast_mka, gqa, linear, mha, mla, sliding
from attnlab.cache import extend
from attnlab.ops import attend, attention_weights
from attnlab.recording import Attended, add_map
from attnlab.recording import _collecting as collecting
from attnlab.spec import CAUSAL, CacheSpec

SMALL = {"d_model": 24, "n_heads": 4, "head_dim": 8}


def right() -> nn.Module:
    return gqa.Attention(gqa.Config(**SMALL))


class DropsItsState(fast_mka.Attention):
    """Decodes with a moving average that starts at zero in every step."""

    def forward(self, x, positions, cache=None, mask=CAUSAL):
        if cache is not None:
            cache = cache.with_state(ema=torch.zeros_like(cache.state["ema"]))
        return super().forward(x, positions, cache, mask)


class TurnsByZero(gqa.Attention):
    """Takes the rotary angle from the index in the call: 0 in every decode step."""

    def project(self, x, positions):
        return super().project(x, torch.where(positions >= 0, torch.arange(x.shape[1]), positions))


class TopLeftMask(gqa.Attention):
    """Aligns the causal mask of a chunk with the first stored key instead of the last."""

    def forward(self, x, positions, cache=None, mask=CAUSAL):
        c = self.config
        q, k, v = self.project(x, positions)
        seen, cache = extend(cache, positions, k=k, v=v)
        index = torch.arange(x.shape[1]).expand_as(positions)
        slots = torch.arange(seen.positions.shape[1]).expand_as(seen.positions)
        y = attend(q, seen.rows["k"], seen.rows["v"], index, slots, mask, impl=c.impl)
        return self.o(y.flatten(2)), cache


class EmptyRowsAreNaN(gqa.Attention):
    """Fills with -inf and normalises: a query that sees nothing divides by zero."""

    def forward(self, x, positions, cache=None, mask=CAUSAL):
        c = self.config
        q, k, v = self.project(x, positions)
        seen, cache = extend(cache, positions, k=k, v=v)
        k, v = (t.repeat_interleave(c.n_heads // t.shape[2], 2) for t in (seen.rows["k"], seen.rows["v"]))
        scores = torch.einsum("blnh,bsnh->bnls", q, k) * c.head_dim**-0.5
        allowed = mask(positions[:, :, None], seen.positions[:, None])[:, None]
        weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
        return self.o(torch.einsum("bnls,bsnh->blnh", weights, v).flatten(2)), cache


class AttendsToPads(gqa.Attention):
    """Knows causality and forgets that a pad is not a token."""

    def forward(self, x, positions, cache=None, mask=CAUSAL):
        start = (positions < 0).sum(1, keepdim=True) if cache is None else 0
        shown = torch.arange(x.shape[1]) - start if cache is None else positions
        return super().forward(x, shown.clamp(min=0) if cache is None else shown, cache, mask)


class PadsStandLeft(gqa.Attention):
    """Counts the pads and takes the first tokens of the row for them."""

    def forward(self, x, positions, cache=None, mask=CAUSAL):
        if cache is None:
            positions = (torch.arange(x.shape[1]) - (positions < 0).sum(1, keepdim=True)).clamp(min=-1)
        return super().forward(x, positions, cache, mask)


class SharesItsBatch(gqa.Attention):
    """Subtracts what the rows of a batch have in common."""

    def forward(self, x, positions, cache=None, mask=CAUSAL):
        return super().forward(x - x.mean(0) if len(x) > 1 else x, positions, cache, mask)


class Decompresses(mla.Attention):
    """Declares a latent and stores every head's keys and values beside it."""

    def forward(self, x, positions, cache=None, mask=CAUSAL):
        y, cache = super().forward(x, positions, cache, mask)
        if cache is not None:
            keys = self.k_up(cache.rows["latent"][..., : self.config.kv_rank]).unflatten(-1, (self.config.n_heads, -1))
            cache = replace(cache, rows={**cache.rows, "k": keys})
        return y, cache


class HidesTensors(gqa.Attention):
    """Keeps what it has seen in the module, where no cache spec counts it."""

    seen: tuple[Tensor, ...] = ()

    def forward(self, x, positions, cache=None, mask=CAUSAL):
        self.seen = (*self.seen, x.detach())
        return super().forward(x, positions, cache, mask)


@dataclass(frozen=True, kw_only=True)
class Understates(gqa.Config):
    """Says that the cache is half as large as it is."""

    @property
    def cache_spec(self) -> CacheSpec:
        return Half(super().cache_spec.rows)


class Half(CacheSpec):
    def floats(self, tokens: int) -> int:
        return super().floats(tokens) // 2


class ReadsTheCapacity(gqa.Attention):
    """Attends over the whole buffer and trusts the mask to give empty rows weight zero."""

    def forward(self, x, positions, cache=None, mask=CAUSAL):
        c = self.config
        q, k, v = self.project(x, positions)
        seen, cache = extend(cache, positions, k=k, v=v)
        where, rows = (seen.positions, seen.rows) if cache is None else (cache.positions, cache.rows)
        y = attend(q, rows["k"], rows["v"], positions, where, replace(mask, plain=False), impl=c.impl)
        return self.o(y.flatten(2)), cache


class BreaksPromises(gqa.Attention):
    """Takes the plain path without being promised anything, so padding is not seen."""

    def forward(self, x, positions, cache=None, mask=CAUSAL):
        return super().forward(x, positions, cache, replace(mask, window=4) if mask.plain else mask)


@dataclass(frozen=True, kw_only=True)
class ClaimsToRewind(sliding.Config):
    window: int = 5

    @property
    def rewinds(self) -> bool:
        return True


class CountsFromOne(gqa.Attention):
    """Adds a learned vector by position to its keys and still calls itself relative."""

    def __init__(self, config):
        super().__init__(config)
        self.where = nn.Parameter(torch.randn(64, config.head_dim))

    def project(self, x, positions):
        q, k, v = super().project(x, positions)
        return q, k + self.where[positions.clamp(min=0) % 64][:, :, None], v


class LowPrecisionAngles(gqa.Attention):
    """Rotates with angles computed in the precision of x: in bfloat16, positions above 256 are no longer exact."""

    def project(self, x, positions):
        c = self.config
        q, k, v = self.qkv(x).unflatten(-1, (-1, c.head_dim)).split([c.n_heads, c.n_kv_heads, c.n_kv_heads], 2)
        half = c.head_dim // 2
        frequency = (c.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)).to(x.dtype)
        angle = positions[..., None, None].to(x.dtype) * frequency

        def turn(t):
            a, b = t[..., :half], t[..., half:]
            return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

        return turn(q), turn(k), v


class LooksAtData(gqa.Attention):
    """Branches on a value, which torch.compile cannot trace."""

    def forward(self, x, positions, cache=None, mask=CAUSAL):
        y, cache = super().forward(x, positions, cache, mask)
        return (y if x.sum().item() > 0 else -y), cache


@dataclass(frozen=True, kw_only=True)
class FlattersItself(gqa.Config):
    """FLOPs that leave the attention core out."""

    def flops(self, queries: int, keys: int) -> int:
        return super().flops(queries, 0)


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


class WrongBackward(gqa.Attention):
    """A kernel whose backward is twice what it should be."""

    def project(self, x, positions):
        q, k, v = super().project(x, positions)
        return StraightThrough.apply(q), k, v


class DependsOnTheKernel(gqa.Attention):
    """Scales scores differently for one kernel."""

    def project(self, x, positions):
        q, k, v = super().project(x, positions)
        return (q * 1.01 if self.config.impl == "reference" else q), k, v


class SharedWeights(gqa.Attention):
    """A projection made once, at import, and used by every layer."""

    shared = nn.Linear(24, 24, bias=False)

    def __init__(self, config):
        super().__init__(config)
        self.mix = self.shared

    def forward(self, x, positions, cache=None, mask=CAUSAL):
        y, cache = super().forward(x, positions, cache, mask)
        return self.mix(y), cache


class Stack(nn.Module):
    """Three layers in a row, as a model has them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(right().double() for _ in range(3))
        self.steps = [
            lambda x, layer=layer: x + layer(x, torch.arange(x.shape[1]).expand(len(x), -1))[0] for layer in self.layers
        ]

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return x


class ClosureStack(Stack):
    """The same, patched in a loop whose closures all see the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = []
        for layer in self.layers:
            self.steps.append(lambda x: x + layer(x, torch.arange(x.shape[1]).expand(len(x), -1))[0])  # noqa: B023


class DrawsOtherMaps(gqa.Attention):
    """Answers with a sharper softmax than the map that it records."""

    def forward(self, x, positions, cache=None, mask=CAUSAL):
        q, k, v = self.project(x, positions)
        seen, cache = extend(cache, positions, k=k, v=v)
        with collecting("_maps", None):
            y = attend(2 * q, seen.rows["k"], seen.rows["v"], positions, seen.positions, mask, impl=self.config.impl)
        call = Attended(positions, seen.positions, seen.rows["v"], y)
        add_map(attention_weights(q, seen.rows["k"], positions, seen.positions, mask, self.config.head_dim**-0.5), call)
        return self.o(y.flatten(2)), cache


class CountsTwice(gqa.Attention):
    """Adds up two answers and tells nobody their shares: rows of its map sum to 2."""

    def ask(self, *args, **more):
        return super().ask(*args, **more) + super().ask(*args, **more)


class RoundsItsState(linear.Attention):
    """Keeps its state as narrow as its input."""

    def forward(self, x, positions, cache=None, mask=CAUSAL):
        y, cache = super().forward(x, positions, cache, mask)
        if cache is not None:
            cache = cache.with_state(**{name: state.to(x.dtype) for name, state in cache.state.items()})
        return y, cache


class SmugglesItsBias(mha.Attention):
    """Hands a bias that grows with every token to the kernel as one more channel of the keys."""

    def __init__(self, config):
        super().__init__(config)
        self.rate = nn.Linear(config.d_model, config.n_heads)
        nn.init.constant_(self.rate.bias, -3.0)

    def forward(self, x, positions, cache=None, mask=CAUSAL):
        q, k, v = self.project(x, positions)
        total = torch.nn.functional.softplus(self.rate(x)).cumsum(1)[..., None]
        q = torch.cat([q, torch.ones_like(q[..., :1])], -1)
        k = torch.cat([k, total * self.config.head_dim**0.5], -1)
        y = attend(q, k, v, positions, positions, mask, self.config.head_dim**-0.5, impl="reference")
        return self.o(y.flatten(2)), cache


@dataclass(frozen=True, kw_only=True)
class KeepsOneToken(gqa.Config):
    """Keeps the last input too."""

    @property
    def cache_spec(self) -> CacheSpec:
        return replace(super().cache_spec, state={"last": (self.d_model,)})

    @property
    def rewinds(self) -> bool:
        return False


class TakesAPauseForZeros(gqa.Attention):
    """Adds the token before to each token; where a sequence pauses, that is a pad, which it takes for zeros."""

    def forward(self, x, positions, cache=None, mask=CAUSAL):
        x = x.masked_fill((positions < 0)[..., None], 0)
        last = torch.zeros_like(x[:, 0]) if cache is None else cache.state["last"]
        before = torch.cat([last[:, None], x[:, :-1]], 1)
        y, cache = super().forward(x + before, positions, cache, mask)
        return y, cache and cache.with_state(last=x[:, -1])


class MultipliesOneTerm(gqa.Attention):
    """Scales its output by a product with one term, which its formula leaves out."""

    def forward(self, x, positions, cache=None, mask=CAUSAL):
        y, cache = super().forward(x, positions, cache, mask)
        return torch.einsum("bld,de->ble", y.mean(-1, keepdim=True), torch.ones_like(y[0, :1])), cache


@dataclass(frozen=True, kw_only=True)
class GivesMore(cla.Config):
    """Declares rows of values twice as wide as they are."""

    @property
    def rows(self):
        return {**super().rows, "v": (self.n_kv_heads, 2 * self.head_dim)}


class MakesItsOwnValues(cla.Attention):
    """Declares that it takes values, and makes them from the keys that it takes."""

    def forward(self, x, positions, cache=None, mask=CAUSAL):
        if self.takes:
            mask = replace(mask, given={**mask.given, "v": mask.given["k"].tanh()})
        return super().forward(x, positions, cache, mask)
