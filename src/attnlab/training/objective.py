"""The objective of healing, which is training that starts from a converted model.

It says which parameters are trained, and what the original model teaches.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import pretrained
from ..errors import UserError
from ..model import Decoder
from ..runs.tensors import load_weights, weights


def start_from(model: Decoder, source: str) -> None:
    """Load the weights of the model that `source` names. `UserError` unless it has the same shape."""
    load_weights(model, weights(pretrained.load(source).model))


def freeze(model: Decoder, train: str) -> None:
    """Freeze all parameters but those of `train`: all, attention or new.

    attention: those of the attention layers. new: those of them without a counterpart in multi-head attention, which
    each mechanism's Config lists (`carries`). Raises `UserError` when nothing is new.
    """
    if train == "all":
        return
    model.requires_grad_(False)
    for block in model.blocks():
        for name, parameter in block.attention.named_parameters():
            carried = set(name.split(".")[0]) <= set(block.attention.config.carries)
            parameter.requires_grad_(train == "attention" or not carried)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(
            f"{', '.join(dict.fromkeys(model.config.mechanisms))} has no parameter that multi-head attention lacks, so "
            "nothing is new: train attention, or all"
        )


def distilled(model: Decoder, source: str, share: float, device: torch.device) -> Callable[..., Tensor]:
    """Return the objective of a student: (x, y, documents) -> (1 - share) cross entropy + share KL(teacher || model).

    Both are in nats per target that counts. The teacher is the model that `source` names (Hinton et al. 2015, arXiv
    1503.02531). Raises `UserError` when its vocabulary is another one.
    """
    teacher = pretrained.load(source).model.to(device).requires_grad_(False)
    theirs = teacher.config.vocab_size
    ours = model.config.vocab_size
    if theirs != ours:
        raise UserError(f"the teacher {source} knows {theirs} tokens and the model {ours}: give the original")

    def objective(x: Tensor, y: Tensor, documents: Tensor | None = None) -> Tensor:
        counts = y.flatten() >= 0
        logits = model(x, documents=documents)[0].flatten(0, 1)[counts].float()
        with torch.no_grad():
            wanted = teacher(x, documents=documents)[0].flatten(0, 1)[counts].float().log_softmax(-1)
        apart = F.kl_div(logits.log_softmax(-1), wanted, reduction="batchmean", log_target=True)
        return share * apart + (1 - share) * F.cross_entropy(logits, y.flatten()[counts])

    return objective
