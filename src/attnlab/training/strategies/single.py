"""One process, and what every strategy does unless it says otherwise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from ...config import TrainConfig
from ...model import Decoder
from ...runs.processes import Processes
from ...runs.tensors import Piece, Stored, optimizer_tensors, weights, whole

Optimizers = dict[str, torch.optim.Optimizer]
Losses = Callable[..., Tensor]  # (x, y, documents) -> the mean over targets that count


class Objective(nn.Module):
    """What a step makes smaller, as a module: the loss, unless a teacher has a say."""

    def __init__(self, model: Decoder, objective: Losses | None) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, x: Tensor, y: Tensor, documents: Tensor | None = None, plain: bool = False) -> Tensor:
        """`plain`: the loss, whoever has a say."""
        return self.model.loss(x, y, documents) if plain or not self.objective else self.objective(x, y, documents)


class Strategy:
    """A model made ready: called, it is the `Objective`. Everything is called by all processes alike."""

    name = "single"
    grouped = False  # whether it needs a process group, if only of one process
    careful = True  # whether a step's gradient is known before it is applied

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
        """`optimizers` makes them, for parameters as this strategy holds them; `parts` are those of a step that this
        process reads one by one; `settings` follow the strategy's name."""
        self.model, self.config, self.processes, self.device = model, config, processes, device
        self.parts, self.settings = parts, settings
        for experts in model.experts() if processes.size > 1 and config.accumulate % processes.size else ():
            experts.together = self.summed
        self.module: nn.Module = Objective(model, objective)
        self.optimizers = self.prepare(optimizers)

    def summed(self, counts: Tensor) -> Tensor:
        return self.processes.add(counts.clone())

    def prepare(self, optimizers: Callable[[TrainConfig, nn.Module], Optimizers]) -> Optimizers:
        self.model.to(self.device)
        if self.config.compile:
            self.module.compile()
        return optimizers(self.config, self.model)

    def __call__(self, x: Tensor, y: Tensor, documents: Tensor | None = None, plain: bool = False) -> Tensor:
        return self.module(x, y, documents, plain)

    def part(self, last: bool) -> AbstractContextManager[object]:
        """Around the forward and backward pass of each part: only after the last are gradients averaged."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(
        self, rate: float, clip: float, scale: float = 1.0, careful: bool = False, fine: bool = True
    ) -> tuple[Tensor, bool]:
        """Apply the gradients, `scale` times too large, at a learning rate, if all is `fine`. Their norm before
        clipping, and whether they were applied: with `careful`, not where that is no finite number."""
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
        return torch.nn.utils.clip_grad_norm_(parameters, clip)

    def weights(self) -> dict[str, Piece]:
        """What this process writes of the model."""
        return {name: whole(tensor) for name, tensor in weights(self.model).items()} if self.processes.first else {}

    def memory(self) -> dict[str, Piece]:
        """What this process writes of the optimizers, by "<optimizer>/<parameter>/<field>"."""
        found = optimizer_tensors(self.model, self.optimizers) if self.processes.first else {}
        return {name: whole(tensor) for name, tensor in found.items()}

    def remember(self, stored: Stored) -> None:
        """The inverse of `memory`, whoever wrote it."""
        parameters = dict(self.model.named_parameters())
        for optimizer in self.optimizers.values():
            optimizer.state.clear()
        for key, label, name, field in stored.states(self.optimizers, parameters):
            parameter = parameters[name]
            self.optimizers[label].state[parameter][field] = self.placed(stored, key, parameter)

    def placed(self, stored: Stored, key: str, parameter: nn.Parameter) -> Tensor:
        return stored.read(key).to(parameter.device)

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)
