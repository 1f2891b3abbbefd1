"""Norms over the channels, as every model here has them."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kmixer.layers.roles import NORM, Role
from kmixer.ops.fused import keep_and_rms_norm, rms_norm

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


class UnweightedRMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + 1e-8) over the last axis."""

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        return rms_norm(x, None, NORM_EPS)

    def keep(self, x: Float[Tensor, "... d"]) -> tuple[Float[Tensor, "... d"], Float[Tensor, "... d"]]:
        """x and its norm; see `RMSNorm.keep`."""
        return keep_and_rms_norm(x, None, NORM_EPS)
