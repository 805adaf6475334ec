"""The feed-forward half of a block: one network, or a mixture of experts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import ModelConfig
from .layers import Linear, linear
from .recording import note, with_loss


def activate(kind: str, x: Tensor) -> Tensor:
    """gelu, exact or as GPT-2 approximates it; relu2: relu(x)^2 (So et al. 2021); swiglu: silu of the first half of x
    times the second (Shazeer 2020)."""
    if kind == "swiglu":
        gate, x = x.chunk(2, -1)
        return F.silu(gate) * x
    return F.relu(x).square() if kind == "relu2" else F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")


class FeedForward(nn.Module):
    """W_out activate(W_in x)."""

    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__()
        self.kind = config.ff_kind
        self.into = Linear(config.d_model, width * (2 if self.kind == "swiglu" else 1), bias=config.bias)
        self.out = Linear(width, config.d_model, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(activate(self.kind, self.into(x)))


class Experts(nn.Module):
    """Mixture of experts: each token goes to its k best of E experts, weighted by softmax over the k logits, or as
    `ExpertsConfig` says. Dropless: no expert has a capacity, so every token gets all k. Load is evened out by the loss
    E sum_i f_i p_i (Switch Transformer, arXiv 2101.03961), or by a bias on the choice alone (arXiv 2408.15664).

    Where several processes read parts of one batch, `together` sums over all of them how many tokens each expert got:
    the f_i are then those of the whole, and so is the loss."""

    bias: Tensor
    load: Tensor | None = None  # tokens that each expert got since the bias last moved
    together: Callable[[Tensor], Tensor] | None = None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.k, self.balance, self.options = config.experts_per_token, config.balance, config.experts
        E, D, F_ = config.n_experts, config.d_model, config.resolved_expert_dim
        self.router = Linear(D, E, bias=False)
        self.into = nn.Parameter(torch.empty(E, F_ * (2 if config.ff_kind == "swiglu" else 1), D))
        self.out = nn.Parameter(torch.empty(E, D, F_))
        self.shared = FeedForward(config, F_ * config.experts.shared) if config.experts.shared else None
        for weight in (self.into, self.out):
            nn.init.normal_(weight, std=0.02)
        self.register_buffer("bias", torch.zeros(E))  # moves an expert's chance to be chosen, not its weight

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        exact = torch.promote_types(x.dtype, torch.float32)  # a rounded score would send tokens elsewhere
        logits = linear(tokens.to(exact), self.router.weight.to(exact))
        chosen, weight = self.route(logits)
        E = len(self.into)
        expert, order = chosen.flatten().sort(stable=True)  # every (token, expert) pair, expert by expert
        counts = note("load", torch.bincount(expert, minlength=E))
        token = order // self.k
        parts = tokens[token].split(counts.tolist())
        each = zip(parts, self.into.unbind(), self.out.unbind(), strict=True)  # indexing adds up whole-size gradients
        done = torch.cat([self.expert(*one) for one in each])
        done = done * weight.flatten()[order, None].to(done.dtype)
        y = torch.zeros_like(tokens, dtype=done.dtype).index_add(0, token, done).view_as(x)
        return self.even_out(y if self.shared is None else y + self.shared(x), logits, counts)

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Which experts each token goes to, and their weights: T k."""
        o = self.options
        sigmoid = o.score == "sigmoid"
        wish = (logits.sigmoid() if sigmoid else logits) + self.bias.to(logits.dtype)
        if o.groups > 1:
            grouped = wish.unflatten(-1, (o.groups, -1))
            best = grouped.topk(o.group_best).values.sum(-1).topk(o.groups_kept).indices
            out = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter(-1, best, False)
            wish = grouped.masked_fill(out[..., None], -torch.inf).flatten(-2)
        chosen = wish.topk(self.k).indices
        weight = (F.logsigmoid(logits) if sigmoid else logits.log_softmax(-1)).gather(1, chosen)
        return chosen, (weight.softmax(-1) if o.normalize else weight.exp()) * o.scale

    def expert(self, x: Tensor, into: Tensor, out: Tensor) -> Tensor:
        return linear(activate(self.options.kind, linear(x, into)), out)

    def even_out(self, y: Tensor, logits: Tensor, counts: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return y
        counts = counts if self.together is None else self.together(counts)
        if self.balance == "bias":
            if self.training:
                self.load = counts if self.load is None else self.load + counts
            return y
        share = counts / counts.sum()
        return with_loss(y, "balance", len(counts) * (share * logits.softmax(-1).mean(0)).sum(), 0.01)

    @torch.no_grad()
    def move_bias(self, taken: bool = True) -> None:
        """After each step: away from experts that got more than their share in it, if it was `taken`."""
        load, self.load = self.load, None
        if load is not None and taken and load.any():
            self.bias += 1e-3 * (1 / len(load) - load / load.sum()).sign()
