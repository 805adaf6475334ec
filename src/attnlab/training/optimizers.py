"""Optimizers, with the schedule of their learning rate and the scale of float16 gradients."""

from __future__ import annotations

import math

import torch
from torch import nn

from ..config import TrainConfig


def learning_rate(config: TrainConfig, step: int) -> float:
    """Return the learning rate of step 0, 1, ...

    It is a linear warm-up, then a cosine to `min_lr`, or a constant rate with a linear fall at the end.
    """
    if step < config.warmup:
        return config.lr * (step + 1) / (config.warmup + 1)
    if config.schedule == "cosine":
        share = (step - config.warmup) / max(1, config.steps - config.warmup)
        height = 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
    else:
        height = min(1.0, (config.steps - step) / (config.decay * config.steps))
    return config.min_lr + height * (config.lr - config.min_lr)


def make_optimizers(config: TrainConfig, model: nn.Module) -> dict[str, torch.optim.Optimizer]:
    """Return the optimizers of a model, by name.

    Matrices have weight decay, embeddings among them; norms and biases have none (nanoGPT's rule). Muon takes the
    matrices between embedding and head, and AdamW everything else.
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
