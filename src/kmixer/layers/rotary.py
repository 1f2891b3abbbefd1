"""Rotary positions, and the head widths that allow them."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kmixer.errors import InputError

# Longest wavelength of the rotations, in units of 2 pi positions (Su et al. 2021).
ROTARY_BASE = 10_000.0


def check_heads(width: int, heads: int, *, rotary: bool = True) -> None:
    """Raises InputError where heads does not divide width, into an even head width where positions rotate."""
    if width % heads:
        raise InputError(f"heads: got {heads} for width {width}; heads must divide width")
    if rotary and width // heads % 2:
        raise InputError(
            f"heads: got {heads} for width {width}; rotary positions act on pairs of channels, "
            "so width / heads must be even"
        )


def rotate(x: Float[Tensor, "*batch t e"], positions: Int[Tensor, " t"]) -> Float[Tensor, "*batch t e"]:
    """Rotate channels (i, i + e/2) of every position p by the angle p / 10000^(2 i / e).

    The product of a rotated query and a rotated key depends on their distance only. Angles and
    tables are float64 for float64 inputs and float32 for every other dtype: an angle in bfloat16
    would be off by whole turns from position 256 on.

    Args:
        x: queries or keys (..., t, e), e even.
        positions: (t,), counted from the start of the sequence.

    Returns:
        The rotated vectors, in the dtype of x.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    half = x.shape[-1] // 2
    exponent = torch.arange(half, device=x.device, dtype=dtype) / half
    angle = positions[:, None].to(dtype) * ROTARY_BASE**-exponent
    cosine, sine = angle.cos(), angle.sin()
    first, second = x.to(dtype).chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1).to(x.dtype)
