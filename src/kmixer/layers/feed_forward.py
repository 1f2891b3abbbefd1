"""Linear maps and norms as every K-Operators model has them, and the feed-forward layer."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kmixer.layers.roles import NORM, Role, linear_roles
from kmixer.ops.feed_forward import feed_forward
from kmixer.ops.fused import keep_and_rms_norm, rms_norm
from kmixer.ops.linear import linear_map

INITIAL_STD = 0.02
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
        """x and its norm, for a layer that adds to its input: training then takes one pass less over memory."""
        return keep_and_rms_norm(x, self.weight, NORM_EPS)


class UnweightedRMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + 1e-8) over the last axis."""

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        return rms_norm(x, None, NORM_EPS)


class Linear(nn.Linear):
    """torch's linear layer, on a CPU by the compiled kernel."""

    def roles(self) -> dict[str, Role]:
        return linear_roles(self)

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... m"]:
        return linear_map(x, self.weight, self.bias)


def linear(inputs: int, outputs: int, *, bias: bool = True) -> Linear:
    """A linear map with weights from N(0, 0.02^2) and bias 0."""
    layer = Linear(inputs, outputs, bias=bias)
    nn.init.normal_(layer.weight, std=INITIAL_STD)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


class FeedForward(nn.Module):
    """h + down(dropout(GELU(up(RMSNorm(h))))) with hidden width 2d, or the one given, and the exact GELU.

    The norm is an argument of `forward`: it belongs to the layer around this one.

    Args:
        width: d.
        hidden_width: of what lies between the two matrices; 2 d when None.
        dropout: on the hidden units, in training.

    Shapes: h (..., d) to (..., d).

    Source: Koneko 2026 (Zenodo 19004569 and 19136398), feed-forward part of K1 and K2.
    """

    def __init__(self, width: int, *, hidden_width: int | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        hidden_width = hidden_width or 2 * width
        self.up = linear(width, hidden_width)
        self.down = linear(hidden_width, width)
        self.dropout = dropout

    def forward(self, h: Float[Tensor, "... d"], norm: RMSNorm) -> Float[Tensor, "... d"]:
        up, down, dropout = self.up, self.down, self.dropout if self.training else 0.0
        weights = (norm.weight, up.weight, up.bias, down.weight, down.bias)
        return feed_forward(h, *weights, eps=NORM_EPS, dropout=dropout)


class SquaredReluFeedForward(nn.Module):
    """h + down(dropout(relu(up(norm(h)))^2)) with a norm without weights, and without biases.

    Args:
        width: d.
        hidden_width: of what lies between the two matrices.
        dropout: on the hidden units, in training.

    Shapes: h (..., d) to (..., d).

    Source: So et al. 2021, squared ReLU.
    """

    def __init__(self, width: int, *, hidden_width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.up = linear(width, hidden_width, bias=False)
        self.down = linear(hidden_width, width, bias=False)
        self.dropout = dropout

    def forward(self, h: Float[Tensor, "... d"], norm: UnweightedRMSNorm) -> Float[Tensor, "... d"]:
        weights = (None, self.up.weight, None, self.down.weight, None)
        dropout = self.dropout if self.training else 0.0
        return feed_forward(h, *weights, eps=NORM_EPS, dropout=dropout, activation="squared_relu")
