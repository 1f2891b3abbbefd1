"""Matrix products at the processor's fastest exact path, and whether it is faster in bfloat16.

`torch.set_float32_matmul_precision("medium")` lets torch's CPU backend take another library path. On some
processors it is twice as fast with the same error; on others it rounds to bfloat16. So it is measured.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch

# Relative error of a float32 product of 256 terms is below 1e-6; rounding to bfloat16 or TF32 makes 1e-3.
EXACT = 1e-5
SIZE = 256


@contextlib.contextmanager
def fast_exact_matmuls(device: torch.device) -> Iterator[None]:
    """Within it, products on a CPU take the "medium" path if its error is that of float32; restored after.

    The setting is the whole process's, and on a GPU it would mean TF32, so there nothing changes.
    """
    with _setting_kept():
        if device.type == "cpu" and torch.get_float32_matmul_precision() == "highest" and _is_exact("medium"):
            torch.set_float32_matmul_precision("medium")
        yield


@contextlib.contextmanager
def _setting_kept() -> Iterator[None]:
    """The precision of products is afterwards what it was: set to the same word, torch's backends would not be."""
    backends: list[Any] = [torch.backends.mkldnn.matmul, torch.backends.cuda.matmul]  # type: ignore[attr-defined]
    before = torch.get_float32_matmul_precision(), [backend.fp32_precision for backend in backends]
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        for backend, precision in zip(backends, before[1], strict=True):
            backend.fp32_precision = precision


def _is_exact(precision: str) -> bool:
    """Whether all three products of a training step (forward, both gradients) are exact at this precision."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(SIZE, SIZE, generator=generator) for _ in range(2))
    with _setting_kept():
        torch.set_float32_matmul_precision(precision)
        products = [a @ b.T, a @ b, a.T @ b]
    exact = [a.double() @ b.double().T, a.double() @ b.double(), a.double().T @ b.double()]
    return all(float((x - y).abs().max() / y.abs().max()) < EXACT for x, y in zip(products, exact, strict=True))


def slower_in_bfloat16(device: torch.device) -> float | None:
    """How many times as long products of bfloat16 take as those of float32; None where they are the faster ones.

    Not every CPU has instructions for them.
    """
    if device.type != "cpu":
        return None
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(SIZE, SIZE, generator=generator) for _ in range(2))
    times = [min(_seconds(x, y) for _ in range(3)) for x, y in ((a, b), (a.bfloat16(), b.bfloat16()))]
    return times[1] / times[0] if times[1] > times[0] else None


def _seconds(a: torch.Tensor, b: torch.Tensor) -> float:
    began = time.perf_counter()
    a @ b
    return time.perf_counter() - began
