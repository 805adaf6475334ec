"""GPUs by name, as their datasheets describe them, and the peak rate that MFU is relative to."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from ..errors import UserError, choose, quoted
from ..ranges import Positive, check_value
from .counters import matrix_rate, matrix_size

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PARTIAL = {"MIG", "NVL"}  # words in the name of a slice of a GPU, and of the slower cards of a pair
PLANNED = ("memory", "flops", "bandwidth")  # the numbers of a GPU that a plan needs


@dataclass(frozen=True)
class Gpu:
    """A GPU, as its datasheet describes it."""

    name: str  # as attnlab plan --gpu takes it
    memory: float  # bytes; a GB is taken as 10^9
    flops: float  # per second, of dense matrix products in bfloat16 or float16
    bandwidth: float  # of its memory, bytes per second
    fp32_flops: float = math.nan  # per second, in float32 without TF32; NaN: not looked up
    words: frozenset[str] = frozenset()  # in the name that the driver gives; empty: its rate is measured instead
    planned: bool = True  # whether attnlab plan --gpu takes it


def _words(name: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", name))


GPUS = {
    gpu.name: gpu
    for gpu in (
        # NVIDIA H100 datasheet, SXM: 80GB, 1,979 teraFLOPS of BFLOAT16 with sparsity, which is half without, 3.35TB/s
        Gpu("h100", 80e9, 989.5e12, 3.35e12, 67e12, _words("H100 HBM3")),
        # NVIDIA H100 datasheet, PCIe: 80GB, 1,513 teraFLOPS of BFLOAT16 with sparsity, 2TB/s
        Gpu("h100-pcie", 80e9, 756.5e12, 2e12, 51e12, _words("H100 PCIe"), planned=False),
        # NVIDIA H200 datasheet, SXM: 141GB, 1,979 teraFLOPS with sparsity, 4.8TB/s
        Gpu("h200", 141e9, 989.5e12, 4.8e12, 67e12, _words("H200")),
        # NVIDIA A100 datasheet, 80GB SXM: 312 TFLOPS of BFLOAT16, 624 with sparsity, 2,039GB/s
        Gpu("a100", 80e9, 312e12, 2.039e12, 19.5e12, _words("A100")),
        # AMD Instinct MI300X datasheet: 192 GB HBM3, 1,307.4 TFLOPS of bfloat16 without sparsity, 5.3 TB/s
        Gpu("mi300", 192e9, 1307.4e12, 5.3e12),
    )
}


def find_gpu(given: str | Mapping[str, Any]) -> Gpu:
    """Return a GPU by its name, or one of numbers: {"memory": 80e9, "flops": 989e12, "bandwidth": 3.35e12}.

    Raises `UserError` for an unknown name, and unless each number is there and above 0.
    """
    if isinstance(given, str):
        return GPUS[choose("GPU", given, [gpu.name for gpu in GPUS.values() if gpu.planned])]
    numbers = [given.get(name) for name in PLANNED]
    if set(given) - {"name", *PLANNED} or None in numbers:
        raise UserError(f"the GPU {quoted(dict(given))} is not known: give each of {', '.join(PLANNED)}, and no more")
    for name, value in zip(PLANNED, numbers, strict=True):
        check_value(f"{name} of the GPU", value, Positive)
    return Gpu(str(given.get("name", "own")), *map(float, numbers))  # type: ignore[arg-type]


class Peak(NamedTuple):
    """The rate that a share of it (MFU) is relative to."""

    rate: float  # FLOPs per second of one device
    source: str  # in words

    def __str__(self) -> str:
        return f"{self.rate / 1e12:.3g} TFLOP/s ({self.source})"


def find_peak(device: torch.device, precision: str, given: float | None = None) -> Peak:
    """Return the peak as given, else by the GPU's datasheet, else measured, which takes half a second.

    `precision`: fp32, bf16 or fp16. Raises `UserError` unless `given` is finite and above 0.
    """
    if given is not None:
        if not (given > 0 and math.isfinite(given)):
            raise UserError(f"--peak is {given}: give the FLOPs per second of one device, such as 989e12")
        return Peak(given, "given by --peak")
    known = datasheet(torch.cuda.get_device_name(device), precision) if device.type == "cuda" else None
    return known or measured_peak(device, precision, torch.get_num_threads())


def datasheet(name: str, precision: str) -> Peak | None:
    """Return the peak of the GPU that the driver calls `name`; None when no datasheet is known."""
    words = _words(name)
    for gpu in GPUS.values():
        if gpu.words and gpu.words <= words and not words & PARTIAL:
            rate = gpu.fp32_flops if precision == "fp32" else gpu.flops
            return Peak(rate, f"datasheet of the {name}, dense {_dtype_name(precision)}")
    return None


@lru_cache
def measured_peak(device: torch.device, precision: str, threads: int) -> Peak:
    """Measure the peak, once in a process that computes with `threads` threads."""
    size = matrix_size(device)
    where = device.type
    if device.type == "cpu":
        where += f", {threads} thread" if threads == 1 else f", {threads} threads"
    product = f"product of two {size}x{size} {_dtype_name(precision)} matrices"
    return Peak(matrix_rate(device, DTYPES[precision]), f"measured: {product} on {where}")


def _dtype_name(precision: str) -> str:
    return str(DTYPES[precision]).removeprefix("torch.")
