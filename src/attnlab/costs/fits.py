"""The memory of a run, asked before it begins: weights, gradients, optimizer states, and the activations of a step."""

from __future__ import annotations

import torch

from ..config import RunConfig
from ..device import check_room, find_device
from ..errors import UserError
from ..measure.gpus import Gpu
from ..model import parameters
from ..ranges import checked
from .plan import Machine, Sizes

FLOAT = 4  # bytes
WIDTHS = 40  # floats of a token's activations in a layer, in widths of the model, at most
SMALLER = "make train.batch_size, model.context or the model smaller, or add --recompute"


@checked
def check_step(config: RunConfig, recompute: bool = False) -> None:
    """Raise `UserError` where a step of one process needs more memory than its device has; nothing is allocated.

    The need is that of `plan`, whose attention keeps no weights, so that no run is refused that fits.
    """
    device = find_device(config.train.device)
    count = parameters(config.model)
    check_room(f"a model of {count:,} parameters", FLOAT * count, SMALLER, device)
    if not _is_large(config, device):
        return
    here = Gpu("this machine", memory=1.0, flops=1.0, bandwidth=1.0)
    found = Sizes(config).memory(Machine(here, recompute=recompute))
    check_room("a step, with its gradients, optimizer states and activations,", found.peak, SMALLER, device)


def _is_large(config: RunConfig, device: torch.device) -> bool:
    """Return whether a step may fill a tenth of the memory, counted from above; the exact count takes a second."""
    model, train = config.model, config.train
    rows = min(train.batch_size, train.batch_size * train.accumulate)
    states = 4 * parameters(model)  # weights, gradients, two moments
    width = WIDTHS * model.d_model + 4 * (model.ff_dim or 4 * model.d_model)
    activations = rows * config.length * (model.n_layers * width + 4 * model.vocab_size)
    try:
        check_room("", 10 * FLOAT * (states + activations), "", device)
    except UserError:
        return True
    return False
