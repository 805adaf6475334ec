"""Mistakes that show in any module x [B T D] -> y [B T D]."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.parametrizations import spectral_norm


class Right(nn.Module):
    """Causal multi-head attention without a mistake; the others differ from it in one place."""

    def __init__(self, d_model: int = 24, n_heads: int = 3) -> None:
        super().__init__()
        self.d_model, self.n_heads = d_model, n_heads
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.o = nn.Linear(d_model, d_model)

    def heads(self, x: Tensor) -> list[Tensor]:
        return [t.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1)]

    def allowed(self, length: int) -> Tensor:
        return torch.ones(length, length, dtype=torch.bool).tril()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        y = scaled_dot_product_attention(q, k, v, self.allowed(x.shape[1]))
        return self.o(y.transpose(1, 2).flatten(2))


class NoMask(Right):
    def allowed(self, length: int) -> Tensor:
        return torch.ones(length, length, dtype=torch.bool)


class InvertedMask(Right):
    def allowed(self, length: int) -> Tensor:
        return ~super().allowed(length)


class OneTooFar(Right):
    def allowed(self, length: int) -> Tensor:
        return torch.ones(length, length, dtype=torch.bool).tril(1)


class WholeSequenceMean(Right):
    """A "session memory" that is the mean over the whole sequence, future included."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + x.mean(1, keepdim=True))


class LeaksInLongChunks(Right):
    """Adds to every token the mean of its whole chunk of 64, once that chunk is complete."""

    def forward(self, x: Tensor) -> Tensor:
        whole = x.shape[1] // 64 * 64
        means = x[:, :whole].unflatten(1, (-1, 64)).mean(2).repeat_interleave(64, 1) if whole else x[:, :0]
        return super().forward(x + torch.cat([means, torch.zeros_like(x[:, whole:])], 1))


class ChoosesFromTheFuture(Right):
    """Keeps the half of the tokens with the largest norm, ranked over the whole sequence: a leak without a gradient."""

    def forward(self, x: Tensor) -> Tensor:
        size = x.detach().norm(dim=-1)
        chosen = size >= size.median(1, keepdim=True).values
        return super().forward(x * chosen[..., None])


class TrainingStatistics(Right):
    """Normalises over batch and sequence while training: nothing leaks when it is evaluated."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(self.d_model)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x.transpose(1, 2)).transpose(1, 2))


class BatchStatistics(Right):
    """Normalises over the batch, in evaluation too."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(0, keepdim=True))


class ReadsRowZero(Right):
    """Gates every sequence by the first one of its batch."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * x[:1].sigmoid()


class PerToken(Right):
    """A feed-forward network that calls itself attention."""

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.qkv(x).chunk(3, -1)[2])


class Forgetful(Right):
    """Mixes the first tokens only: later ones see themselves and nothing else."""

    def allowed(self, length: int) -> Tensor:
        keep = super().allowed(length)
        keep[8:] &= torch.eye(length, dtype=torch.bool)[8:]
        return keep


class DiscardedKeys(Right):
    """Computes keys and attends with the values in their place: a third of the projection is dead."""

    def forward(self, x: Tensor) -> Tensor:
        q, _, v = self.heads(x)
        y = scaled_dot_product_attention(q, v, v, self.allowed(x.shape[1]))
        return self.o(y.transpose(1, 2).flatten(2))


class UnusedProjection(Right):
    def __init__(self) -> None:
        super().__init__()
        self.k_proj = nn.Linear(self.d_model, self.d_model)


class Detached(Right):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return super().forward(x)


class Remembers(Right):
    """Keeps the last call's mean in the module, so the same question has two answers."""

    last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        y, self.last = (y if self.last is None else y + self.last), x.detach().mean()
        return y


class DropsAlways(Right):
    """Drops attention in evaluation too: `dropout(p)` with its default, `training=True`."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.dropout(super().forward(x), 0.1)


class WritesIntoInput(Right):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x[:, 0] += 1
        return super().forward(x)


class NormWithoutEpsilon(Right):
    """Divides by the token's own size: 0 / 0 for an empty one."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x / x.norm(dim=-1, keepdim=True))


class Overflows(Right):
    """A softmax by hand that does not subtract the maximum."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        weights = (q @ k.transpose(-1, -2)).exp() * self.allowed(x.shape[1])
        return self.o((weights / weights.sum(-1, keepdim=True) @ v).transpose(1, 2).flatten(2))


class HiddenLayers(Right):
    """Keeps a projection in a Python list, where neither the optimiser nor the state dict finds it."""

    def __init__(self) -> None:
        super().__init__()
        self.more = [nn.Linear(self.d_model, self.d_model).double()]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.more[0](x)


class DividesByLength(Right):
    """Averages over the call: every output moves when tokens are appended."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.cumsum(1) / x.shape[1]


class LogLength(Right):
    """Scales scores by the logarithm of the length of the call, from 100 tokens on."""

    def heads(self, x: Tensor) -> list[Tensor]:
        q, k, v = super().heads(x)
        return [q * max(1.0, math.log(x.shape[1]) / math.log(100)), k, v]


class LeaksAtTiles(Right):
    """Takes a way without a mask where the sequence fills tiles of 256 exactly."""

    def allowed(self, length: int) -> Tensor:
        return super().allowed(length) | (length % 256 == 0)


class RemembersLongest(Right):
    """Grows a constant with the longest call it ever saw."""

    longest = 0

    def forward(self, x: Tensor) -> Tensor:
        self.longest = max(self.longest, x.shape[1])
        return super().forward(x) * (1 + self.longest / 1000)


class RemembersInItsClass(Right):
    """Does the same for all instances together, which no copy undoes."""

    def forward(self, x: Tensor) -> Tensor:
        longest = type(self).longest = max(type(self).longest, x.shape[1])
        return super().forward(x) * (1 + longest / 1000)

    longest = 0


class RemembersInAList(Right):
    """Keeps the largest number it ever saw, in a list that it changes in place."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = [1.0]

    def forward(self, x: Tensor) -> Tensor:
        self.largest[0] = max(self.largest[0], float(x.detach().abs().max()))
        return super().forward(x) / self.largest[0]


class KeepsItsFirstMask(Right):
    """Makes its mask for the first call, and lets longer ones see what is beyond it."""

    kept: Tensor | None = None

    def allowed(self, length: int) -> Tensor:
        if self.kept is None:
            self.kept = super().allowed(length)
        more = max(0, length - len(self.kept))
        return nn.functional.pad(self.kept, (0, more, 0, more), value=True)[:length, :length]


class FiniteMask(Right):
    """Masks with -10,000, which the scores of large inputs pass."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        scores = q @ k.transpose(-1, -2)
        weights = scores.masked_fill(~self.allowed(x.shape[1]), -1e4).softmax(-1)
        return self.o((weights @ v).transpose(1, 2).flatten(2))


class MasksOnlyToLearn(Right):
    """Leaves its mask out where no gradients are recorded."""

    def allowed(self, length: int) -> Tensor:
        return super().allowed(length) | (not torch.is_grad_enabled())


class LeaksUnderAutocast(Right):
    """Leaves its mask out in low precision."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        keep = self.allowed(x.shape[1]) | (q.dtype == torch.bfloat16)
        return self.o(scaled_dot_product_attention(q, k, v, keep).transpose(1, 2).flatten(2))


class Scaled(torch.autograd.Function):
    """The identity with a gradient that is too small."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None


class NineTenthsOfAGradient(Right):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        y = scaled_dot_product_attention(q, Scaled.apply(k, 0.9), v, self.allowed(x.shape[1]))
        return self.o(y.transpose(1, 2).flatten(2))


class WrongGradientInTraining(Right):
    def forward(self, x: Tensor) -> Tensor:
        return Scaled.apply(super().forward(x), 0.5 if self.training else 1.0)


class WrongGradientOfLongCalls(Right):
    def forward(self, x: Tensor) -> Tensor:
        return Scaled.apply(super().forward(x), 0.5 if x.shape[1] > 64 else 1.0)


class AnglesInBfloat16(Right):
    """Turns keys and queries by angles that are computed in the precision of the input."""

    def heads(self, x: Tensor) -> list[Tensor]:
        q, k, v = super().heads(x)
        frequency = 10_000.0 ** (-torch.arange(0, q.shape[-1], 2) / q.shape[-1])
        angle = torch.arange(x.shape[1], dtype=q.dtype)[:, None] * frequency.to(q.dtype)

        def turn(t: Tensor) -> Tensor:
            a, b = t.chunk(2, -1)
            return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

        return [turn(q), turn(k), v]


class GrowingBuffer(Right):
    """Keeps its mask in a buffer that is saved and grows with use."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", super().allowed(4))

    def allowed(self, length: int) -> Tensor:
        if length > len(self.seen):
            self.register_buffer("seen", super().allowed(length))
        return self.seen[:length, :length]


class UnsavedStatistics(Right):
    """Learns a mean while training, in a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(self.d_model), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        mean = self.mean.clone()
        if self.training:
            with torch.no_grad():
                self.mean += 0.1 * x.mean((0, 1))
        return super().forward(x - mean)


class StopsInTraining(Right):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            raise NotImplementedError("only for inference")
        return super().forward(x)


class AssumesItsLayout(Right):
    """Reads x as if it lay in one piece."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.as_strided(x.shape, (x.shape[1] * x.shape[2], x.shape[2], 1)))


class KeepsItsGraph(Right):
    """Adds a share of its last mean, graph and all: a second training step runs backward through the first."""

    last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.training:
            y, self.last = (y if self.last is None else y + 0 * self.last), y.mean()
        return y


class KeepsInferenceTensors(Right):
    """Makes a table once; made in inference mode, it cannot be learned through later."""

    table: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None or len(self.table) < x.shape[1]:
            self.table = torch.linspace(1, 2, 2000, dtype=x.dtype)[:, None]
        return super().forward(x * self.table[: x.shape[1]])


# -- right ones, which look suspicious -------------------------------------------------------------------------------


class SpectralNorm(Right):
    """Takes a step of power iteration in place in every call while training."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = spectral_norm(self.qkv)


class MovingAverage(Right):
    """Follows the mean of its keys while training, in place, and subtracts what it had before."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(self.d_model))

    def forward(self, x: Tensor) -> Tensor:
        mean = self.mean.clone()
        if self.training:
            with torch.no_grad():
                self.mean.mul_(0.9).add_(0.1 * x.mean((0, 1)))
        return super().forward(x - mean)


class Codebook(Right):
    """Rounds keys to the nearest of a codebook that follows them while training; gradients pass straight through."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("codes", 0.5 * torch.randn(16, 8, generator=generator))
        self.register_buffer("counts", torch.ones(16))

    def heads(self, x: Tensor) -> list[Tensor]:
        q, k, v = super().heads(x)
        nearest = torch.cdist(k.detach().float(), self.codes.float()[None]).argmin(-1)
        codes = self.codes.to(k.dtype)[nearest]
        if self.training:
            with torch.no_grad():
                chosen = nn.functional.one_hot(nearest, 16).flatten(0, -2).to(k.dtype)
                self.counts.mul_(0.9).add_(0.1 * chosen.sum(0))
                self.codes.mul_(0.9).add_(0.1 * (chosen.T @ k.flatten(0, -2)) / self.counts[:, None])
        return [q, k + (codes - k).detach(), v]


class SecondOutput(Right):
    """Has a head for a loss of its own, which is the second output."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(self.d_model, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:  # type: ignore[override]
        y = super().forward(x)
        return y, {"balance": self.score(y).mean()}


class WithoutGradients(Right):
    """Runs a kernel that refuses inputs that want a gradient."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise NotImplementedError("the kernel has no backward pass on this device")
        return super().forward(x)


class SequenceFirst(Right):
    """Takes x [T B D]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(0, 1)).transpose(0, 1)
