"""Norms over the channels, and the functions of every number alone that may stand in their place."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kmixer.errors import InputError
from kmixer.layers.roles import BIAS, NORM, Role
from kmixer.ops.fused import keep_and_rms_norm, rms_norm
from kmixer.ops.pointwise_norm import Function, Pointwise, keep_and_pointwise_norm, pointwise_norm

NORM_EPS = 1e-8


class RMSNorm(nn.Module):
    """weight x / sqrt(mean(x^2) + 1e-8) over the last axis; weight starts at 1."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def roles(self) -> dict[str, Role]:
        return {"weight": NORM}

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        return rms_norm(x, self.weight, NORM_EPS)

    def keep(self, x: Float[Tensor, "... d"]) -> tuple[Float[Tensor, "... d"], Float[Tensor, "... d"]]:
        """x and its norm, for a block that adds to its input: training then takes one pass less over memory."""
        return keep_and_rms_norm(x, self.weight, NORM_EPS)

    def weights(self) -> Tensor | Pointwise | None:
        """What kernels that have the norm inside take; see `kmixer.ops.feed_forward`."""
        return self.weight


class UnweightedRMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + 1e-8) over the last axis."""

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        return rms_norm(x, None, NORM_EPS)

    def keep(self, x: Float[Tensor, "... d"]) -> tuple[Float[Tensor, "... d"], Float[Tensor, "... d"]]:
        """x and its norm; see `RMSNorm.keep`."""
        return keep_and_rms_norm(x, None, NORM_EPS)

    def weights(self) -> Tensor | Pointwise | None:
        """See `RMSNorm.weights`."""
        return None


class PointwiseNorm(nn.Module):
    """gain f(alpha x + shift) + bias, element by element, f a bounded function: what `DyT` and `Derf` share.

    These do not see the scale of x: where that is small beside 1 / alpha, so is what they give; see `match`.
    """

    function: Function

    def __init__(self, width: int, alpha: float = 0.5, *, gain: bool = True, bias: bool = False) -> None:
        super().__init__()
        if not (alpha > 0 and math.isfinite(alpha)):
            raise InputError(f"alpha: got {alpha}; allowed: above 0")
        self.width, self.initial_alpha = width, alpha
        self.alpha = nn.Parameter(torch.tensor(float(alpha)))
        self.shift: nn.Parameter | None = None
        self.gain = nn.Parameter(torch.ones(width)) if gain else None
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def roles(self) -> dict[str, Role]:
        roles = {"alpha": NORM, "shift": NORM, "gain": NORM, "bias": BIAS}
        return {name: role for name, role in roles.items() if getattr(self, name) is not None}

    def weights(self) -> Pointwise:
        """See `RMSNorm.weights`."""
        return Pointwise(self.function, self.alpha, self.shift, self.gain, self.bias)

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        return pointwise_norm(x, self.weights())

    def keep(self, x: Float[Tensor, "... d"]) -> tuple[Float[Tensor, "... d"], Float[Tensor, "... d"]]:
        """x and its norm; see `RMSNorm.keep`."""
        return keep_and_pointwise_norm(x, self.weights())

    @torch.no_grad()
    def match(self, x: Float[Tensor, "... d"]) -> None:
        """Begin with this x as if it had root mean square 1, and with 1 in what comes out, where there is a gain.

        alpha = alpha_0 / rms(x), then gain = 1 / rms(f(alpha x + shift)). Raises InputError for an x of zeros.
        """
        scale = root_mean_square(x)
        if not (scale > 0 and math.isfinite(scale)):
            raise InputError(f"match: the input of a norm has root mean square {scale}; allowed: above 0, finite")
        self.alpha.fill_(self.initial_alpha / scale)
        if self.gain is not None:
            bare = self.weights()._replace(gain=None, bias=None)
            self.gain.fill_(1 / root_mean_square(pointwise_norm(x, bare)))


class DyT(PointwiseNorm):
    """gain tanh(alpha x) + bias, element by element: dynamic tanh.

    Args:
        width: d.
        alpha: where alpha starts, above 0. It is one number per layer, and trained.
        gain: has a gain (d), which starts at 1.
        bias: has a bias (d), which starts at 0.

    Shapes: x (..., d) to (..., d).
    Raises InputError for an alpha that is not above 0.

    Source: Zhu et al. 2025, arXiv 2503.10622.
    """

    function = "tanh"


class Derf(PointwiseNorm):
    """gain erf(alpha x + shift) + bias, element by element.

    Args:
        width: d.
        alpha: where alpha starts, above 0. It and the shift, which starts at 0, are one number per layer, and trained.
        gain: has a gain (d), which starts at 1.
        bias: has a bias (d), which starts at 0.

    Shapes: x (..., d) to (..., d).
    Raises InputError for an alpha that is not above 0.

    Source: Chen et al. 2025, arXiv 2512.10938.
    """

    function = "erf"

    def __init__(self, width: int, alpha: float = 0.5, *, gain: bool = True, bias: bool = False) -> None:
        super().__init__(width, alpha, gain=gain, bias=bias)
        self.shift = nn.Parameter(torch.zeros(()))


# Those that are one operation with what stands beside them: they have `keep` and `weights`.
FUSED = (RMSNorm, UnweightedRMSNorm, DyT, Derf)


def root_mean_square(x: Tensor) -> float:
    """Over all elements."""
    return math.sqrt(float(x.double().square().mean()))
