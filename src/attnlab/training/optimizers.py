"""Optimizers, and what each of them moves."""

from __future__ import annotations

import torch
from torch import nn

from ..config import TrainConfig


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
