"""What the benches measure with: time and memory of the device, FLOPs of a piece of work, and the device's rate."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from clmoe.plan.cost import CARDS

R = TypeVar("R")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name() -> str:
    """For a report's first line."""
    return torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU, one thread"


def timed(work: Callable[[], R]) -> tuple[float, R]:
    """Seconds, by the GPU's events or of this process on the CPU, and what ``work`` returns."""
    if DEVICE.type == "cpu":
        start = time.process_time()
        result = work()
        return time.process_time() - start, result
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    result = work()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1e3, result


class Peak:
    """Peak memory in MiB since it was made: tensors on the GPU, or this process (Linux)."""

    def __init__(self) -> None:
        if DEVICE.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            ctypes.CDLL(None).malloc_trim(0)  # what an earlier form freed must not count for this one
            Path("/proc/self/clear_refs").write_text("5")

    def mib(self) -> float:
        """The peak until now."""
        if DEVICE.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024


def flops(work: Callable[[], object]) -> int:
    """Multiplications and additions in the matrix products of one run of ``work``; torch's counter, attention apart."""
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _product_in_place}) as counter:
        work()
    return counter.get_total_flops()


def _product_in_place(out: torch.Size, a: torch.Size, b: torch.Size, *unused: object, **named: object) -> int:
    """torch counts only ``addmm``."""
    return 2 * a[0] * a[1] * b[1]


class Products(TorchDispatchMode):
    """The matrix products of what runs inside, to be repeated on random numbers without all the rest.

    Every product has its own factors, as in the step: shared ones would stay in the cache. They take as much memory as
    everything that the products read.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_, torch.ops.aten.bmm):
            a, b = [value for value in args if isinstance(value, Tensor)][-2:]
            self.pairs.append((_alike(a), _alike(b)))
        return func(*args, **(kwargs or {}))

    def repeat(self) -> None:
        """Compute them again, one after the other."""
        for a, b in self.pairs:
            a @ b


def _alike(tensor: Tensor) -> Tensor:
    """Random numbers with the shape, strides and type of ``tensor``."""
    size = 1 + sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return torch.randn(size, device=tensor.device).to(tensor.dtype).as_strided(tensor.shape, tensor.stride())


def peak_rate(dtype: torch.dtype) -> float:
    """The data sheet's rate, or ``best_rate`` for a device that is not in ``CARDS``."""
    return next((card.rate for card in CARDS if card.name in device_name()), 0.0) or best_rate(dtype)


def best_rate(dtype: torch.dtype) -> float:
    """FLOPs per second of one large matrix product, the best of five."""
    side = 8192 if DEVICE.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=DEVICE).to(dtype) for _ in range(2))
    return 2 * side**3 / min(timed(lambda: a @ b)[0] for _ in range(6))
