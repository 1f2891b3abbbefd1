"""Linear maps as every K-Operators model initialises them, and the feed-forward layer."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

INITIAL_STD = 0.02


def linear(inputs: int, outputs: int, *, bias: bool = True) -> nn.Linear:
    """A linear map with weights from N(0, 0.02^2) and bias 0."""
    layer = nn.Linear(inputs, outputs, bias=bias)
    nn.init.normal_(layer.weight, std=INITIAL_STD)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


class FeedForward(nn.Module):
    """down(dropout(GELU(up(x)))) with hidden width 2d and the exact GELU."""

    def __init__(self, width: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.up = linear(width, 2 * width)
        self.down = linear(2 * width, width)
        self.dropout = dropout

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        hidden = F.dropout(F.gelu(self.up(x)), self.dropout, self.training)
        return self.down(hidden)
