"""Float32 matrix products at the processor's fastest exact path.

`torch.set_float32_matmul_precision("medium")` lets torch's CPU backend take another library path. On some
processors it is twice as fast with the same error; on others it rounds to bfloat16. So it is measured.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

# Relative error of a float32 product of 256 terms is below 1e-6; rounding to bfloat16 or TF32 makes 1e-3.
EXACT = 1e-5
SIZE = 256


@contextlib.contextmanager
def fast_exact_matmuls(device: torch.device) -> Iterator[None]:
    """Within it, products on a CPU take the "medium" path if its error is that of float32; restored after.

    The setting is the whole process's, and on a GPU it would mean TF32, so there nothing changes.
    """
    before = torch.get_float32_matmul_precision()
    if device.type == "cpu" and before == "highest" and _is_exact("medium"):
        torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _is_exact(precision: str) -> bool:
    """Whether all three products of a training step (forward, both gradients) are exact at this precision."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(SIZE, SIZE, generator=generator) for _ in range(2))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        products = [a @ b.T, a @ b, a.T @ b]
    finally:
        torch.set_float32_matmul_precision(before)
    exact = [a.double() @ b.double().T, a.double() @ b.double(), a.double().T @ b.double()]
    return all(float((x - y).abs().max() / y.abs().max()) < EXACT for x, y in zip(products, exact, strict=True))
