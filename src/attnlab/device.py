"""Devices: which one a run uses, in which precision, and whether it can compile."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from .errors import UserError
from .formatting import size


def find_device(name: str) -> torch.device:
    """Return the device called `name`; "auto" is a GPU where there is one. `UserError` lists what is there."""
    there = ["cpu"]
    if torch.cuda.is_available():
        there += ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        there.append("mps")
    if name == "auto":
        return torch.device(there[min(1, len(there) - 1)])
    if name not in there:
        raise UserError(f"the device {name!r} is not there: allowed here are auto, {', '.join(there)}")
    return torch.device(name)


def find_precision(name: str, device: torch.device) -> str:
    """Return the precision called `name`; "auto" is bf16 where the processor multiplies it in hardware, else fp32."""
    if name != "auto":
        return name
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        able = torch.cpu.get_capabilities() if device.type == "cpu" else {}
        fast = bool(able.get("avx512_bf16") or able.get("amx_bf16"))
    return "bf16" if fast else "fp32"


def check_compiler(option: str, device: torch.device) -> None:
    """Raise `UserError` where torch.compile, which `option` asks for, cannot work on this machine."""
    if device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            raise UserError(
                f"{option} needs a C++ compiler, and none was found; install g++ or clang++, or leave it off"
            ) from None


def wait_for(device: torch.device) -> None:
    """Wait until the device has finished all its work: only then a clock may be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or the type of another device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def host_memory() -> int | None:
    """Return the bytes of this machine's memory, what it swaps to included; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        sizes = {line.partition(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith("kB")}
        return sizes["MemTotal"] + sizes.get("SwapTotal", 0)
    except (OSError, ValueError, KeyError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def check_room(what: str, count: int, advice: str, device: torch.device | None = None) -> None:
    """Raise `UserError` where `count` bytes are more than all the memory of a device; None: of this machine.

    It is asked before anything is allocated. `what` needs them, and `advice` says how to need fewer.
    """
    if device is not None and device.type == "cuda":
        there: int | None = torch.cuda.get_device_properties(device).total_memory
    else:
        there = host_memory()
    if there is not None and count > there:
        raise UserError(
            f"{what} would take {size(count, 'terminal')}, and there are {size(there, 'terminal')}: {advice}"
        )
