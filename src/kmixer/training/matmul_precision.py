"""Float32 matrix products at the processor's fastest exact path.

`torch.set_float32_matmul_precision("medium")` lets torch's CPU backend take another library path. On some
processors it is twice as fast with the same error; on others it rounds to bfloat16. So it is measured.
"""

from __future__ import annotations

import contextlib
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
