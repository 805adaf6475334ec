"""The feed-forward half of a block: one network, or a mixture of experts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import ModelConfig
from .errors import UserError, choose, quoted
from .layers import Linear, linear
from .ranges import Count, checked
from .recording import note, with_loss

ACTIVATIONS = ("gelu", "gelu_tanh", "relu2", "swiglu")


def activate(kind: str, x: Tensor) -> Tensor:
    """Return the activation of x (... F): gelu, exact, or gelu_tanh, as GPT-2 approximates it; relu2, relu(x)^2 (So et
    al. 2021); swiglu, silu of the first half of x times the second half (Shazeer 2020), F / 2 wide."""
    if not isinstance(kind, str) or kind not in ACTIVATIONS:
        choose("kind", kind, ACTIVATIONS)
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise UserError(f"x is {quoted(x)}: give a tensor of floating-point numbers")
    if kind == "swiglu":
        gate, x = x.chunk(2, -1)
        return F.silu(gate) * x
    if kind == "relu2":
        return F.relu(x).square()
    return F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")


class FeedForward(nn.Module):
    """W_out activate(W_in x)."""

    @checked
    def __init__(self, config: ModelConfig, width: Count) -> None:
        super().__init__()
        self.kind = config.ff_kind
        self.into = Linear(config.d_model, width * (2 if self.kind == "swiglu" else 1), bias=config.bias)
        self.out = Linear(width, config.d_model, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: ... D -> ... D."""
        return self.out(activate(self.kind, self.into(x)))


class Experts(nn.Module):
    """Mixture of experts: each token goes to its k best of E experts, weighted by softmax over the k logits, or as
    `ExpertsConfig` says.

    No expert has a capacity, so every token passes all its k. The load is balanced by the loss E sum_i f_i p_i (Switch
    Transformer, arXiv 2101.03961), where f_i is the share of the tokens that expert i got and p_i its mean probability,
    or by a bias on the choice alone (arXiv 2408.15664).
    """

    bias: Tensor  # E
    load: Tensor | None = None  # E: tokens that each expert got since the bias last moved
    together: Callable[[Tensor], Tensor] | None = None  # sums counts over all processes that read parts of one batch

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.k = config.experts_per_token
        self.balance = config.balance
        self.options = config.experts
        E, D = config.n_experts, config.d_model
        width = config.resolved_expert_dim
        self.router = Linear(D, E, bias=False)
        self.into = nn.Parameter(torch.empty(E, width * (2 if config.ff_kind == "swiglu" else 1), D))
        self.out = nn.Parameter(torch.empty(E, D, width))
        self.shared = FeedForward(config, width * config.experts.shared) if config.experts.shared else None
        for weight in (self.into, self.out):
            nn.init.normal_(weight, std=0.02)
        self.register_buffer("bias", torch.zeros(E))  # moves an expert's chance to be chosen, not its weight

    def forward(self, x: Tensor) -> Tensor:
        """x: ... D -> ... D."""
        tokens = x.flatten(0, -2)
        exact = torch.promote_types(x.dtype, torch.float32)  # a rounded score would change the choice of experts
        logits = linear(tokens.to(exact), self.router.weight.to(exact))
        chosen, weight = self.route(logits)
        expert, order = chosen.flatten().sort(stable=True)  # every (token, expert) pair, expert by expert
        counts = note("load", torch.bincount(expert, minlength=len(self.into)))
        token = order // self.k
        parts = tokens[token].split(counts.tolist())
        # unbind, because the backward pass of an index adds up gradients of the whole tensor
        experts = zip(parts, self.into.unbind(), self.out.unbind(), strict=True)
        done = torch.cat([self.expert(*each) for each in experts])
        done = done * weight.flatten()[order, None].to(done.dtype)
        y = torch.zeros_like(tokens, dtype=done.dtype).index_add(0, token, done).view_as(x)
        if self.shared is not None:
            y = y + self.shared(x)
        return self.even_out(y, logits, counts)

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the experts of each token and their weights, both T k, from the logits of T tokens, T E."""
        options = self.options
        sigmoid = options.score == "sigmoid"
        score = logits.sigmoid() if sigmoid else logits
        score = score + self.bias.to(logits.dtype)
        if options.groups > 1:
            grouped = score.unflatten(-1, (options.groups, -1))
            kept = grouped.topk(options.group_best).values.sum(-1).topk(options.groups_kept).indices
            left_out = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter(-1, kept, False)
            score = grouped.masked_fill(left_out[..., None], -torch.inf).flatten(-2)
        chosen = score.topk(self.k).indices
        log_weight = F.logsigmoid(logits) if sigmoid else logits.log_softmax(-1)
        log_weight = log_weight.gather(1, chosen)
        weight = log_weight.softmax(-1) if options.normalize else log_weight.exp()
        return chosen, weight * options.scale

    def expert(self, x: Tensor, into: Tensor, out: Tensor) -> Tensor:
        """Return the output of one expert with these matrices for its tokens, T D -> T D."""
        return linear(activate(self.options.kind, linear(x, into)), out)

    def even_out(self, y: Tensor, logits: Tensor, counts: Tensor) -> Tensor:
        """Return y, with the balance loss attached or the load counted. `counts`: E, the tokens of each expert."""
        if not torch.is_grad_enabled():
            return y
        counts = counts if self.together is None else self.together(counts)
        if self.balance == "bias":
            if self.training:
                self.load = counts if self.load is None else self.load + counts
            return y
        share = counts / counts.sum()
        loss = len(counts) * (share * logits.softmax(-1).mean(0)).sum()
        return with_loss(y, "balance", loss, 0.01)

    @torch.no_grad()
    def move_bias(self, taken: bool = True) -> None:
        """Lower the bias of experts that got more than their share of a step, and raise that of others.

        Call it after each step. Where the step was not `taken`, its load is forgotten and the bias stays.
        """
        load = self.load
        self.load = None
        if load is not None and taken and load.any():
            self.bias += 1e-3 * (1 / len(load) - load / load.sum()).sign()
