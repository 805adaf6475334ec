"""Fully sharded data parallel: parameters, gradients and optimizer state are cut along their first dimension.

Each process holds one slice, and a layer is gathered while it computes (torch.distributed.fsdp.fully_shard). Gradients
are cut after every part of a step, so that none is ever whole. A checkpoint holds a slice as a piece of the flattened
tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ...config import TrainConfig
from ...errors import UserError
from ...runs.tensors import Piece, Stored, optimizer_tensors, whole_piece
from ..sharding import Sharding
from . import single
from .single import Optimizers


class Strategy(single.Strategy):
    """Every process holds a slice of each tensor."""

    name = "fsdp"
    sharding = Sharding("fsdp", 3, by_rows=True)
    grouped = True

    def prepare(self, optimizers: Callable[[TrainConfig, nn.Module], Optimizers]) -> Optimizers:
        if self.config.optimizer == "muon":
            raise UserError("train.optimizer muon needs whole matrices, which fsdp cuts: give adamw, or --strategy ddp")
        mesh = init_device_mesh(self.device.type, (self.processes.size,))
        for block in self.model.blocks():
            if self.config.compile:
                block.compile()
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        return optimizers(self.config, self.model)

    def clipped(self, parameters: list[nn.Parameter], clip: float) -> Tensor:
        norm = super().clipped(parameters, clip)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def weights(self) -> dict[str, Piece]:
        self.slice_up()
        buffers = {name: b for name, b in self.model.named_buffers() if name in self.model.state_dict()}
        return self.pieces(dict(self.model.named_parameters()) | buffers)

    def memory(self) -> dict[str, Piece]:
        self.slice_up()
        return self.pieces(optimizer_tensors(self.model, self.optimizers))

    def slice_up(self) -> None:
        """Cut the parameters that no layer owns: after a forward pass without a backward pass they are still whole."""
        root: Any = self.model
        root.reshard()

    def pieces(self, tensors: dict[str, Any]) -> dict[str, Piece]:
        """Return the slices of tensors that are cut. Of the others, which are equal everywhere, the first process
        returns all."""
        found = {}
        for name, tensor in tensors.items():
            if isinstance(tensor, DTensor):
                local = tensor.to_local()
                if local.numel():
                    found[name] = Piece(local.detach().flatten(), slice_of(tensor), tuple(tensor.shape))
            elif self.processes.first:
                found[name] = whole_piece(tensor)
        return found

    def placed(self, stored: Stored, key: str, parameter: nn.Parameter) -> Tensor:
        if not isinstance(parameter, DTensor) or stored.shape(key) != tuple(parameter.shape):
            return super().placed(stored, key, parameter)
        local = parameter.to_local()
        start = slice_of(parameter)
        value = stored.read(key, start, start + local.numel()).view(local.shape).to(local.device)
        return DTensor.from_local(
            value,
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )


def slice_of(tensor: DTensor) -> int:
    """Return the first element of this process's slice, in the flattened tensor."""
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return sum(at * step for at, step in zip(offset, tensor.stride(), strict=True))
