"""GPUs by name, and the peak that a share of it (MFU) is relative to."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from ..errors import UserError, choose
from .counters import matrix_rate, matrix_size

DATASHEETS = {  # words of its name: NVIDIA's dense products per second, in 16 bits and in float32 without TF32
    "H100 HBM3": (989.5e12, 67e12),
    "H100 PCIe": (756.5e12, 51e12),
    "H200": (989.5e12, 67e12),
    "A100": (312e12, 19.5e12),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PARTIAL = {"MIG", "NVL"}  # a slice of a GPU, and the slower cards of a pair


class Peak(NamedTuple):
    rate: float  # FLOPs per second of one device
    source: str  # in words

    def __str__(self) -> str:
        return f"{self.rate / 1e12:.3g} TFLOP/s ({self.source})"


def find_peak(device: torch.device, precision: str, given: float | None = None) -> Peak:
    """What MFU is relative to: as given, else by the GPU's datasheet, else measured, in half a second.

    `precision`: fp32, bf16 or fp16. Raises `UserError` for a rate that is none.
    """
    if given is not None:
        if not (given > 0 and math.isfinite(given)):
            raise UserError(f"--peak is {given}: give the FLOPs per second of one device, such as 989e12")
        return Peak(given, "given by --peak")
    known = datasheet(torch.cuda.get_device_name(device), precision) if device.type == "cuda" else None
    return known or measured_peak(device, precision, torch.get_num_threads())


def datasheet(gpu: str, precision: str) -> Peak | None:
    """By the name that the driver gives; None for a GPU not listed."""
    words = set(re.findall(r"\w+", gpu))
    for name, (half, single) in DATASHEETS.items():
        if set(name.split()) <= words and not words & PARTIAL:
            return Peak(single if precision == "fp32" else half, f"datasheet of the {gpu}, dense {_kind(precision)}")
    return None


@lru_cache
def measured_peak(device: torch.device, precision: str, threads: int) -> Peak:
    """Once in a process, which trains with `threads`."""
    size, where = matrix_size(device), device.type
    if device.type == "cpu":
        where += f", {threads} thread{'s' * (threads != 1)}"
    product = f"product of two {size}x{size} {_kind(precision)} matrices"
    return Peak(matrix_rate(device, DTYPES[precision]), f"measured: {product} on {where}")


def _kind(precision: str) -> str:
    return str(DTYPES[precision]).removeprefix("torch.")


@dataclass(frozen=True)
class Gpu:
    """As its datasheet says, in bytes (a GB taken as 10^9), FLOPs per second of dense bfloat16 matrix products, and
    bytes per second."""

    name: str
    memory: float
    flops: float
    bandwidth: float


GPUS = {
    gpu.name: gpu
    for gpu in (
        # NVIDIA H100 datasheet, SXM: 80GB, 1,979 teraFLOPS of BFLOAT16 with sparsity, which is half without, 3.35TB/s
        Gpu("h100", 80e9, 989.5e12, 3.35e12),
        # NVIDIA H200 datasheet, SXM: 141GB, 1,979 teraFLOPS with sparsity, 4.8TB/s
        Gpu("h200", 141e9, 989.5e12, 4.8e12),
        # NVIDIA A100 datasheet, 80GB SXM: 312 TFLOPS of BFLOAT16, 624 with sparsity, 2,039GB/s
        Gpu("a100", 80e9, 312e12, 2.039e12),
        # AMD Instinct MI300X datasheet: 192 GB HBM3, 1,307.4 TFLOPS of bfloat16 without sparsity, 5.3 TB/s
        Gpu("mi300", 192e9, 1307.4e12, 5.3e12),
    )
}


def find_gpu(given: str | Mapping[str, Any]) -> Gpu:
    """By name, or of numbers: {"memory": 80e9, "flops": 989e12, "bandwidth": 3.35e12}."""
    if isinstance(given, str):
        return GPUS[choose("GPU", given, GPUS)]
    wanted = [f.name for f in fields(Gpu) if f.name != "name"]
    numbers = [given.get(name) for name in wanted]
    if set(given) - {"name", *wanted} or not all(isinstance(n, int | float) and 0 < n < float("inf") for n in numbers):
        raise UserError(f"the GPU {dict(given)} is not known: give a number above 0 for each of {', '.join(wanted)}")
    return Gpu(str(given.get("name", "own")), *map(float, numbers))  # type: ignore[arg-type]
