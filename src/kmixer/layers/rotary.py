"""Rotary positions, and the head widths that allow them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kmixer.errors import InputError

# Longest wavelength of the rotations, in units of 2 pi positions (Su et al. 2021).
ROTARY_BASE = 10_000.0


def check_heads(width: int, heads: int, *, rotary: bool = True) -> None:
    """Raises InputError where heads does not divide width, into an even head width where positions rotate."""
    if heads < 1 or width % heads:
        raise InputError(f"heads: got {heads} for width {width}; heads must divide width")
    if rotary and width // heads % 2:
        raise InputError(
            f"heads: got {heads} for width {width}; rotary positions act on pairs of channels, "
            "so width / heads must be even"
        )


class Rotation(NamedTuple):
    """The angles of positions and planes: their cosines and sines (t, e/2), or (b, 1, t, e/2) of rows of their own."""

    cosine: Float[Tensor, "*rows t p"]
    sine: Float[Tensor, "*rows t p"]

    def every(self, step: int, first: int) -> Rotation:
        """That of every so many positions, from the one in place `first` on; views."""
        return Rotation(self.cosine[first::step], self.sine[first::step])


def rotation(positions: Int[Tensor, "*rows t"], e: int, dtype: torch.dtype) -> Rotation:
    """The angles p / 10000^(2 i / e), i < e / 2, of positions p.

    Angles and tables are float64 for float64 and float32 for every other dtype: an angle in bfloat16 would be off by
    whole turns from position 256 on.

    Args:
        positions: (t,), counted from the start of the sequence; (b, 1, t) where every row of a batch has its own.
        e: width of what is rotated, even.
        dtype: of what is rotated.
    """
    dtype = torch.promote_types(dtype, torch.float32)
    angle = positions[..., None].to(dtype) * rotary_frequencies(e, dtype, positions.device)
    return Rotation(angle.cos(), angle.sin())


def rotary_frequencies(
    e: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None
) -> Float[Tensor, " p"]:
    """10000^(-2 i / e), i < e / 2: the angles of position 1."""
    exponent = torch.arange(e // 2, device=device, dtype=dtype) / (e // 2)
    return ROTARY_BASE**-exponent


def rotate(x: Float[Tensor, "*batch t e"], angles: Rotation) -> Float[Tensor, "*batch t e"]:
    """Rotate channels (i, i + e/2) of every position by its angle.

    The product of a rotated query and a rotated key depends on their distance only.

    Args:
        x: queries or keys (..., t, e).

    Returns:
        The rotated vectors, in the dtype of x.
    """
    rotated: Tensor = _Rotation.apply(x.to(angles.cosine.dtype), *angles)
    return rotated.to(x.dtype)


class _Rotation(torch.autograd.Function):
    """Written by hand: the gradient is the rotation back, and nothing but the tables is kept for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        first, second = x.chunk(2, dim=-1)
        parts = (first * cosine).addcmul_(second, sine, value=-1), (second * cosine).addcmul_(first, sine)
        return torch.cat(parts, dim=-1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        cosine, sine = ctx.saved_tensors
        return _Rotation.apply(gradients[0], cosine, -sine), None, None
