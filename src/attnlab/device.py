"""Devices: which one a run uses, in which precision, and whether it can compile."""

from __future__ import annotations

import torch

from .errors import UserError


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
