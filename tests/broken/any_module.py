"""Mistakes that show in any module x [B T D] -> y [B T D]."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


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
