"""The strategy of one process, and the base of all others."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from ...config import TrainConfig
from ...errors import UserError
from ...model import Decoder
from ...runs.processes import Processes
from ...runs.tensors import Piece, Stored, optimizer_tensors, weights, whole_piece
from ..sharding import Sharding

Optimizers = dict[str, torch.optim.Optimizer]
Losses = Callable[..., Tensor]  # (x, y, documents) -> mean over the targets that count


class Objective(nn.Module):
    """The quantity that a step minimises, as a module: the model's loss, or an objective with a teacher."""

    def __init__(self, model: Decoder, objective: Losses | None) -> None:
        super().__init__()
        self.model = model
        self.objective = objective

    def forward(self, x: Tensor, y: Tensor, documents: Tensor | None = None, plain: bool = False) -> Tensor:
        """Return the mean over the targets that count. `plain`: of the model's loss, without a teacher."""
        if plain or self.objective is None:
            return self.model.loss(x, y, documents)
        return self.objective(x, y, documents)


class Strategy:
    """A model that is ready to train; calling it calls the `Objective`.

    All processes must make the same calls, in the same order.
    """

    name = "single"  # as results show it
    sharding: Sharding | None = None  # how several processes share the work; None: it is for one process
    takes_settings = False  # whether settings may follow the name and a colon
    grouped = False  # whether it needs a process group, even of one process
    careful = True  # whether the gradient of a step is known before it is applied

    def __init__(
        self,
        model: Decoder,
        objective: Losses | None,
        optimizers: Callable[[TrainConfig, nn.Module], Optimizers],
        config: TrainConfig,
        processes: Processes,
        device: torch.device,
        parts: int,
        settings: str = "",
    ) -> None:
        """`optimizers` makes them, for parameters as this strategy holds them. `parts`: the number of parts of a step
        that this process reads one by one. `settings` follow the strategy's name."""
        self.model = model
        self.config = config
        self.processes = processes
        self.device = device
        self.parts = parts
        self.settings = settings
        for experts in model.experts() if processes.size > 1 and config.accumulate % processes.size else ():
            experts.together = self.summed
        self.module: nn.Module = Objective(model, objective)
        self.optimizers = self.prepare(optimizers)

    @classmethod
    def shards(cls, settings: str) -> Sharding:
        """Return how it shards with these settings. `UserError` for settings that are wrong."""
        assert cls.sharding is not None, "one process shards nothing"
        return cls.sharding

    def summed(self, counts: Tensor) -> Tensor:
        """Return the sum of `counts` over all processes."""
        return self.processes.add(counts.clone())

    def prepare(self, optimizers: Callable[[TrainConfig, nn.Module], Optimizers]) -> Optimizers:
        """Put the model on its device, ready to train. Returns its optimizers, by name."""
        self.model.to(self.device)
        if self.config.compile:
            self.module.compile()
        return optimizers(self.config, self.model)

    def __call__(self, x: Tensor, y: Tensor, documents: Tensor | None = None, plain: bool = False) -> Tensor:
        return self.module(x, y, documents, plain)

    def part(self, last: bool) -> AbstractContextManager[object]:
        """Return a context for the forward and backward pass of a part; gradients are averaged after the last part."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`."""
        loss.backward()

    def step(
        self, rate: float, clip: float, scale: float = 1.0, careful: bool = False, fine: bool = True
    ) -> tuple[Tensor, bool]:
        """Apply the gradients at the learning rate `rate`, and clear them. Returns their norm before clipping, and
        whether they were applied.

        `clip`: largest norm; 0: none. `scale`: the factor by which the gradients are too large. They are not applied
        unless `fine`, nor, with `careful`, when their norm is not finite.
        """
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        if scale != 1:
            for parameter in parameters:
                parameter.grad.div_(scale)  # type: ignore[union-attr]
        norm = self.clipped(parameters, clip or math.inf)
        applied = fine and (not careful or math.isfinite(norm.item()))
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = rate
            if applied:
                optimizer.step()
            optimizer.zero_grad()
        return norm, applied

    def clipped(self, parameters: list[nn.Parameter], clip: float) -> Tensor:
        """Clip the gradients to the norm `clip`. Returns their norm before."""
        return torch.nn.utils.clip_grad_norm_(parameters, clip)

    def weights(self) -> dict[str, Piece]:
        """Return the pieces of the model that this process writes into a checkpoint, by name."""
        return (
            {name: whole_piece(tensor) for name, tensor in weights(self.model).items()} if self.processes.first else {}
        )

    def memory(self) -> dict[str, Piece]:
        """Return the pieces of optimizer states that this process writes, by "<optimizer>/<parameter>/<field>"."""
        found = optimizer_tensors(self.model, self.optimizers) if self.processes.first else {}
        return {name: whole_piece(tensor) for name, tensor in found.items()}

    def remember(self, stored: Stored) -> None:
        """Load the optimizer states that `memory` gave, under any strategy."""
        parameters = dict(self.model.named_parameters())
        for optimizer in self.optimizers.values():
            optimizer.state.clear()
        for key, label, name, field in stored.states(self.optimizers, parameters):
            parameter = parameters[name]
            self.optimizers[label].state[parameter][field] = self.placed(stored, key, parameter)

    def placed(self, stored: Stored, key: str, parameter: nn.Parameter) -> Tensor:
        """Return one stored state, as the optimizer of this process holds it. `UserError` for a wrong shape."""
        if stored.shape(key) not in ((), tuple(parameter.shape)):
            raise UserError(
                f"the checkpoint's optimizer state {key} has the shape {[*stored.shape(key)]} and its parameter "
                f"{[*parameter.shape]}: it is not of this run; train again into another folder"
            )
        return stored.read(key).to(parameter.device)

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters that are trained, and their names."""
        yield from ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)
