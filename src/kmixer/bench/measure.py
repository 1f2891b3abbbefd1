"""Timing, and the roofs a time is held against."""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from kmixer.training.process import settle_process

MATRIX = 1024
# A product that takes longer is measured once: without instructions for bfloat16 it takes seconds.
LONGEST_PRODUCT = 0.5
COPIED_BYTES = 256 * 1024 * 1024


def settle(threads: int) -> None:
    """Make this process ready to time, with so many threads. Roofs take seconds: check the input before them."""
    settle_process()
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the first, and the median of the rest (the first where it was the only one)."""

    first: float
    median: float


def time_calls(call: Callable[[], object], repeats: int = 5, longest: float = float("inf")) -> Timing:
    """Time a call: once, and then `repeats` times, unless the first took more than `longest` seconds."""
    seconds = []
    for _ in range(repeats + 1):
        seconds.append(_seconds_of(call))
        if seconds[0] > longest:
            return Timing(seconds[0], seconds[0])
    return Timing(seconds[0], statistics.median(seconds[1:]))


def time_in_turn(calls: dict[str, Callable[[], object]], repeats: int = 5) -> dict[str, dict[str, float]]:
    """Time calls one after the other, in as many rounds; the first round is not counted.

    On a shared machine the speed drifts by more than calls differ. What is timed in the same second drifts alike.

    Returns:
        Of every call `seconds`, its median, and `relative`, the median of its ratios to the first call of the round.
    """
    rounds = [[_seconds_of(call) for call in calls.values()] for _ in range(repeats + 1)][1:]
    return {
        name: {
            "seconds": statistics.median(seconds[index] for seconds in rounds),
            "relative": statistics.median(seconds[index] / seconds[0] for seconds in rounds),
        }
        for index, name in enumerate(calls)
    }


def _seconds_of(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def matmul_flops_per_second(dtype: torch.dtype = torch.float32) -> float:
    """Measured rate of large matrix products with the threads in force."""
    a, b = (torch.randn(MATRIX, MATRIX).to(dtype) for _ in range(2))
    return 2 * MATRIX**3 / time_calls(lambda: a @ b, 9, LONGEST_PRODUCT).median


def copied_bytes_per_second() -> float:
    """Measured rate of copying memory, counting bytes read and written."""
    source = torch.ones(COPIED_BYTES // 4)
    target = torch.empty_like(source)
    return 2 * COPIED_BYTES / time_calls(lambda: target.copy_(source), 5).median


def resident_megabytes() -> float:
    """The memory that this process holds now; on Linux."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def peak_resident_bytes() -> int:
    """The most memory this process has held at once."""
    status = Path("/proc/self/status")
    if status.is_file():  # ru_maxrss of a child starts at what its parent held
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclass(frozen=True)
class Roofs:
    """What the machine reaches with these threads."""

    threads: int
    matmul_float32_flops_per_second: float
    matmul_bfloat16_flops_per_second: float
    copied_bytes_per_second: float

    def matmul(self, precision: Literal["float32", "bfloat16"]) -> float:
        """Floating-point operations per second of large matrix products."""
        return self.matmul_float32_flops_per_second if precision == "float32" else self.matmul_bfloat16_flops_per_second


def roofs() -> Roofs:
    """What the machine reaches, measured now."""
    return Roofs(
        threads=torch.get_num_threads(),
        matmul_float32_flops_per_second=matmul_flops_per_second(),
        matmul_bfloat16_flops_per_second=matmul_flops_per_second(torch.bfloat16),
        copied_bytes_per_second=copied_bytes_per_second(),
    )


def peak_of(program: str, *arguments: str) -> int:
    """Bytes that a Python program, run in a fresh process, prints as its peak."""
    command = [sys.executable, "-c", program, *arguments]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
