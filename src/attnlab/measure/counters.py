"""Measurements of a call: its time, memory and FLOPs."""

from __future__ import annotations

import gc
import math
import sys
import time
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from ..device import wait_for

K = TypeVar("K", bound=Hashable)


def interleaved(timed: Mapping[K, Callable[[], float]], repeats: int, warm_up: int = 1) -> dict[K, list[float]]:
    """Return the seconds of `repeats` calls of each, made in turns (A B C A B C ...).

    A slow moment of the machine then affects all alike. Each callable measures itself, so that its preparation is not
    counted.
    """
    for call in timed.values():
        for _ in range(warm_up):
            call()
    seconds: dict[K, list[float]] = {key: [] for key in timed}
    for _ in range(repeats):
        for key, call in timed.items():
            seconds[key].append(call())
    return seconds


def read_speed(repeats: int = 5) -> float:
    """Return the bytes per second that the processor reads from memory, with all threads together.

    It is the fastest sum over a buffer that is too large for any cache.
    """
    buffer = torch.ones(2**26)

    def seconds() -> float:
        began = time.perf_counter()
        buffer.sum()
        return time.perf_counter() - began

    return buffer.nbytes / min(seconds() for _ in range(repeats))


def matrix_size(device: torch.device) -> int:
    """Return the rows of the square matrices whose product `matrix_rate` measures."""
    return 1024 if device.type == "cpu" else 8192


def matrix_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.5) -> float:
    """Return the FLOPs per second of a product of two square matrices: the median of all products in `seconds`."""
    size = matrix_size(device)
    a = torch.ones(size, size, dtype=dtype, device=device)
    times: list[float] = []
    began = time.perf_counter()
    while not times or time.perf_counter() - began < seconds:
        wait_for(device)
        started = time.perf_counter()
        a @ a
        wait_for(device)
        times.append(time.perf_counter() - started)
    return 2 * size**3 / sorted(times)[len(times) // 2]


def counted_flops(call: Callable[[], object]) -> int:
    """Return the FLOPs of the matrix products in `call`, backward passes included; a causal mask saves nothing."""
    with flop_counter() as counter:
        call()
    return counter.get_total_flops()


def flop_counter() -> FlopCounterMode:
    """Return a context that counts as `counted_flops` does."""
    counter = FlopCounterMode(display=False, custom_mapping=_CPU_KERNELS)
    counter.mod_tracker = _NoModules()  # type: ignore[assignment]  # its hooks break on a module called without gradients
    return counter


class _NoModules(nullcontext[None]):
    parents: ClassVar[set[str]] = {"Global"}


def _forward(q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sdpa_flop_count(q, k, v)


def _linear(x: Any, weight: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * math.prod(x) * weight[0]


def _backward(grad: Any, q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sdpa_backward_flop_count(grad, q, k, v)


def _add_product(into: Any, a: Any, b: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * math.prod(a) * b[-1]


_CPU_KERNELS: dict[Any, Any] = {  # PyTorch's counter lacks the kernels of the CPU, and products in place
    torch.ops.aten.baddbmm_: _add_product,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
}
if torch.backends.mkldnn.is_available():
    _CPU_KERNELS[torch.ops.mkldnn._linear_pointwise] = _linear


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the memory behind the tensors; memory that several share counts once."""
    return sum({_key(t): t.untyped_storage().nbytes() for t in tensors}.values())


def peak_growth(call: Callable[[], object], device: torch.device) -> int:
    """Return the most bytes of tensors during `call`, beyond those that were there before it.

    On a GPU the allocator tells. On a CPU the results of every operation are followed until they are freed. That is
    exact for tensors, without the scratch memory inside a kernel, and without anything else that the process holds.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with Follow() as follow:
        call()
    return follow.peak


def reset_peak() -> None:
    """Make `peak_bytes` count from here."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: VmHWM starts again from what is resident now
    except OSError:
        pass


def peak_bytes(device: torch.device) -> int:
    """Return the most bytes held at once since `reset_peak`: by tensors on a GPU, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


class Follow(TorchDispatchMode):
    """A context that counts the bytes of the storages made in it, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:
            parts = function.decompose(*args, **kwargs)  # in inference mode operations arrive whole
        if parts is not NotImplemented:
            return parts
        self._note((args, kwargs), new=False)
        out = function(*args, **kwargs)
        self._note(out, new=True)
        self.peak = max(self.peak, self.now)
        return out

    def _note(self, values: Any, *, new: bool) -> None:
        for value in tree_iter(values):
            if isinstance(value, Tensor) and (key := _key(value)) not in self.known:
                storage = value.untyped_storage()
                size = storage.nbytes() if new else 0  # arguments from outside were there before
                self.now += size
                self.known.add(key)
                weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
