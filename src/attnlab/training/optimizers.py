"""The learning rate, the optimizers, and the scale of float16 gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from ..config import TrainConfig


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of step 0, 1, ...: a linear warm-up, then cosine to `min_lr`, or flat and a linear fall at the end."""
    if step < config.warmup:
        return config.lr * (step + 1) / (config.warmup + 1)
    if config.schedule == "cosine":
        share = (step - config.warmup) / max(1, config.steps - config.warmup)
        height = 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
    else:
        height = min(1.0, (config.steps - step) / (config.decay * config.steps))
    return config.min_lr + height * (config.lr - config.min_lr)


def make_optimizers(config: TrainConfig, model: nn.Module) -> dict[str, torch.optim.Optimizer]:
    """By name. Weight decay pulls on matrices, embeddings among them, not on norms and biases (nanoGPT's rule).

    With Muon, it takes the matrices between embedding and head, and AdamW everything else.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    outer = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    outer |= {id(p) for name, p in model.named_parameters() if name.split(".")[0] == "head"}
    optimizers: dict[str, torch.optim.Optimizer] = {}
    if config.optimizer == "muon":
        hidden = [p for p in parameters if p.ndim == 2 and id(p) not in outer]
        parameters = [p for p in parameters if p.ndim != 2 or id(p) in outer]
        optimizers["muon"] = torch.optim.Muon(
            hidden,
            lr=config.lr,
            weight_decay=config.weight_decay,
            adjust_lr_fn="match_rms_adamw",  # one rate then suits both optimizers
        )
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizers["adamw"] = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=config.betas,
        fused=all(p.device.type in ("cpu", "cuda", "mps", "xpu") for p in parameters),
    )
    return optimizers


@dataclass
class Scale:
    """What float16 gradients are multiplied by so that small ones are not lost: halved when they overflow, doubled
    after 2000 steps in which they did not (Micikevicius et al. 2018, arXiv 1710.03740)."""

    used: bool
    factor: float = 2.0**16
    good: int = 0

    @property
    def now(self) -> float:
        return self.factor if self.used else 1.0

    def learn(self, applied: bool) -> None:
        self.good = self.good + 1 if applied else 0
        if not applied:
            self.factor /= 2
        elif self.good % 2000 == 0:
            self.factor *= 2
