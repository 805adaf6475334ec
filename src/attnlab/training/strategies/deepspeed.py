"""DeepSpeed's ZeRO: stage 1 shards the optimizer's state, 2 the gradients too, 3 the parameters too.

Its optimizers hold flat vectors, and every parameter is a stretch of one. A checkpoint holds these stretches. The stage
is 1 unless a file says otherwise. The file may set anything of DeepSpeed's, except what a run's own config sets.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...config import TrainConfig
from ...errors import UserError, need
from ...files import read_json
from ...runs.tensors import Piece, Stored, whole_piece
from ..sharding import Sharding
from . import single
from .single import Optimizers

OURS = {  # settings of DeepSpeed's that a run's own config sets, and by which option
    "optimizer": "train.optimizer",
    "scheduler": "train.schedule",
    "fp16": "train.precision",
    "bf16": "train.precision",
    "amp": "train.precision",
    "torch_autocast": "train.precision",
    "gradient_clipping": "train.clip",
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.batch_size",
    "gradient_accumulation_steps": "train.accumulate",
}
NO_CLIP = 1e30  # DeepSpeed measures no norm where it clips none


class Stretch(NamedTuple):
    """Part of a parameter, and its place in an optimizer's flat vector."""

    name: str  # of the parameter
    shape: tuple[int, ...]  # of the parameter
    start: int  # first element, in the flattened parameter
    flat: Tensor  # the optimizer's flat vector
    at: int  # first element, in the flat vector
    length: int  # in elements


def settings_of(path: str) -> dict[str, Any]:
    """Return the DeepSpeed config in the file `path` ("": stage 1).

    Raises `UserError` for what is not such a config, or sets what a run's own config sets.
    """
    if not path:
        return {"zero_optimization": {"stage": 1}}
    if not Path(path).is_file():
        raise UserError(f"deepspeed:{path}: there is no such file; give a DeepSpeed config in JSON, or deepspeed alone")
    found: dict[str, Any] = read_json(Path(path), dict, 'give an object such as {"zero_optimization": {"stage": 2}}')
    if taken := [name for name in OURS if name in found]:
        raise UserError(f"{path} sets {taken[0]}, which is --{OURS[taken[0]]} here: remove it from the file")
    zero = found.get("zero_optimization", {})
    stage = zero.get("stage", 0) if isinstance(zero, dict) else zero
    if not isinstance(zero, dict) or stage not in (1, 2, 3):
        raise UserError(
            f"{path} asks for ZeRO stage {json.dumps(stage)}: give zero_optimization.stage 1, 2 or 3, or --strategy ddp"
        )
    offloaded = [key for key in ("offload_optimizer", "offload_param") if zero.get(key)]
    if offloaded:
        raise UserError(f"{path} sets {offloaded[0]}, which attnlab cannot write into checkpoints: remove it")
    return found


class Strategy(single.Strategy):
    """Every process holds stretches of flat vectors, by ZeRO's stage."""

    name = "deepspeed"
    sharding = Sharding("deepspeed, ZeRO stage 1", 1)
    takes_settings = True
    grouped = True
    careful = False

    @classmethod
    def shards(cls, settings: str) -> Sharding:
        stage = settings_of(settings)["zero_optimization"]["stage"]
        return Sharding(f"deepspeed, ZeRO stage {stage}", stage)

    def prepare(self, optimizers: Callable[[TrainConfig, nn.Module], Optimizers]) -> Optimizers:
        settings = settings_of(self.settings)
        self.stage: int = settings["zero_optimization"]["stage"]
        self.name = f"deepspeed, ZeRO stage {self.stage}"
        if self.config.optimizer == "muon":
            raise UserError("train.optimizer muon needs whole matrices, which deepspeed flattens: give adamw")
        if self.config.compile and self.stage == 3:
            raise UserError("train.compile cannot see the parameters that ZeRO stage 3 takes away: leave it off")
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)  # which it calls
        deepspeed = need("deepspeed", "scale")
        if self.device.type == "cpu":
            # gloo is there; this one would have to be compiled first
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        made = super().prepare(optimizers)
        settings |= {
            "train_micro_batch_size_per_gpu": 1,  # DeepSpeed divides nothing by these two here
            "gradient_accumulation_steps": self.parts,
            "gradient_clipping": self.config.clip or NO_CLIP,
            "steps_per_print": 2**60,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        self.engine, *_ = deepspeed.initialize(
            model=self.module, optimizer=made["adamw"], config=settings, dist_init_required=False
        )
        return {"adamw": self.engine.optimizer.optimizer}

    def __call__(self, x: Tensor, y: Tensor, documents: Tensor | None = None, plain: bool = False) -> Tensor:
        return self.engine(x, y, documents, plain)

    def part(self, last: bool) -> AbstractContextManager[object]:
        self.engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(
        self, rate: float, clip: float, scale: float = 1.0, careful: bool = False, fine: bool = True
    ) -> tuple[Tensor, bool]:
        assert scale == 1 and not careful and fine
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        self.engine.step()
        return torch.as_tensor(self.engine.get_global_grad_norm(), device=self.device).float(), True

    def weights(self) -> dict[str, Piece]:
        if self.stage < 3:
            return super().weights()
        found = {}
        for name, parameter in self.model.named_parameters():
            own: Any = parameter
            start, real = self.own_slice(own, own.ds_tensor.numel())
            if real:
                found[name] = Piece(own.ds_tensor.detach()[:real], start, tuple(own.ds_shape))
        kept = self.model.state_dict()
        buffers = {name: whole_piece(buffer) for name, buffer in self.model.named_buffers() if name in kept}
        return found | (buffers if self.processes.first else {})

    def memory(self) -> dict[str, Piece]:
        found = {}
        for name, shape, start, flat, at, length in self.stretches():
            for field, value in self.optimizers["adamw"].state[flat].items():
                key = f"adamw/{name}/{field}"
                if value.shape == flat.shape:
                    found[key] = Piece(value.detach()[at : at + length], start, shape)
                elif start == 0:
                    found[key] = whole_piece(value.clone())  # one number for the whole vector
        return found

    def remember(self, stored: Stored) -> None:
        state = self.optimizers["adamw"].state
        fields: dict[str, list[tuple[str, str]]] = {}
        for key, _, name, field in stored.states(self.optimizers, dict(self.model.named_parameters())):
            fields.setdefault(name, []).append((key, field))
        for name, shape, start, flat, at, length in self.stretches():
            for key, field in fields.get(name, ()):
                if stored.shape(key) == shape:
                    vector = state[flat].setdefault(field, torch.zeros_like(flat))
                    vector.detach()[at : at + length] = stored.read(key, start, start + length).to(flat.device)
                else:
                    state[flat][field] = stored.read(key).to(flat.device)

    def stretches(self) -> Iterator[Stretch]:
        """Yield the part of each trained parameter that this process's optimizer holds."""
        names = {id(parameter): name for name, parameter in self.trained()}
        return self.stretches_of_slices(names) if self.stage == 3 else self.stretches_of_fragments(names)

    def stretches_of_fragments(self, names: Mapping[int, str]) -> Iterator[Stretch]:
        """Yield the stretches of stages 1 and 2: parameters are whole, and the flat vector is cut anywhere.

        `names` of parameters, by their id.
        """
        zero = self.engine.optimizer
        for flat, group in zip(zero.single_partition_of_fp32_groups, zero.bit16_groups, strict=True):
            for p in group:
                if p._hp_mapping is not None:  # part of it lies in the flat vector of this process
                    here = p._hp_mapping.lp_fragment_address
                    there = p._hp_mapping.hp_fragment_address
                    yield Stretch(names[id(p)], tuple(p.shape), here.start, flat, there.start, here.numel)

    def stretches_of_slices(self, names: Mapping[int, str]) -> Iterator[Stretch]:
        """Yield the stretches of stage 3: every process holds an equal slice of each parameter.

        `names` of parameters, by their id.
        """
        zero = self.engine.optimizer
        for flat, group in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True):
            for p in group:
                _, at, length = zero.grad_position[zero.get_param_id(p)]
                start, real = self.own_slice(p, length)
                if real:
                    yield Stretch(names[id(p)], tuple(p.ds_shape), start, flat, at, real)

    def own_slice(self, parameter: Any, length: int) -> tuple[int, int]:
        """Return the first element of this process's slice of a parameter, and its length without padding.

        Slices have `length` elements each; the last ones are padded.
        """
        start = self.processes.rank * length
        return start, max(0, min(length, parameter.ds_numel - start))
