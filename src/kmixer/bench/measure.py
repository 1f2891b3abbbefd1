"""Timing, and the roofs a time is held against."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

MATRIX = 1024
# A product that takes longer is measured once: without instructions for bfloat16 it takes seconds.
LONGEST_PRODUCT = 0.5
COPIED_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the first, and the median of the rest (the first where it was the only one)."""

    first: float
    median: float


def time_calls(call: Callable[[], object], repeats: int = 5, longest: float = float("inf")) -> Timing:
    """Time a call: once, and then `repeats` times, unless the first took more than `longest` seconds."""
    seconds = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
        if seconds[0] > longest:
            return Timing(seconds[0], seconds[0])
    return Timing(seconds[0], statistics.median(seconds[1:] or seconds))


@dataclass(frozen=True)
class Side:
    """One of several calls timed in turn: its median in seconds, and the median of its ratios to the first call."""

    median: float
    relative: float


def time_in_turn(calls: dict[str, Callable[[], object]], repeats: int = 5) -> dict[str, Side]:
    """Time calls one after the other, in as many rounds; a ratio is taken within a round.

    On a shared machine the speed drifts by more than calls differ. What is timed in the same second drifts alike.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            seconds[name].append(time_calls(call, 0).first)
    first = next(iter(seconds.values()))
    return {
        name: Side(
            median=statistics.median(each[1:]),
            relative=statistics.median(a / b for a, b in zip(each[1:], first[1:], strict=True)),
        )
        for name, each in seconds.items()
    }


def matmul_flops_per_second(dtype: torch.dtype = torch.float32) -> float:
    """Measured rate of large matrix products with the threads in force."""
    a, b = (torch.randn(MATRIX, MATRIX).to(dtype) for _ in range(2))
    return 2 * MATRIX**3 / time_calls(lambda: a @ b, 9, LONGEST_PRODUCT).median


def copied_bytes_per_second() -> float:
    """Measured rate of copying memory, counting bytes read and written."""
    source = torch.ones(COPIED_BYTES // 4)
    target = torch.empty_like(source)
    return 2 * COPIED_BYTES / time_calls(lambda: target.copy_(source), 5).median


def peak_resident_bytes() -> int:
    """The most memory this process has held at once."""
    status = Path("/proc/self/status")
    if status.is_file():  # ru_maxrss of a child starts at what its parent held
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def roofs() -> dict[str, Any]:
    """What the machine reaches, measured now."""
    return {
        "threads": torch.get_num_threads(),
        "matmul_float32_flops_per_second": matmul_flops_per_second(),
        "matmul_bfloat16_flops_per_second": matmul_flops_per_second(torch.bfloat16),
        "copied_bytes_per_second": copied_bytes_per_second(),
    }
