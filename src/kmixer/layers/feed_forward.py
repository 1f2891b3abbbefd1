"""Feed-forward layers: the branch alone, position by position. A block normalises before it and adds after it."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kmixer.layers.linear import linear


class FeedForward(nn.Module):
    """down(dropout(GELU(up(x)))) with hidden width 2d, or the one given, and the exact GELU.

    Args:
        width: d.
        hidden_width: of what lies between the two matrices; 2 d when None.
        dropout: on the hidden units, in training.

    Shapes: x (..., d) to (..., d).

    Source: Koneko 2026 (Zenodo 19004569 and 19136398), feed-forward part of K1 and K2.
    """

    def __init__(self, width: int, *, hidden_width: int | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        hidden_width = hidden_width or 2 * width
        self.up = linear(width, hidden_width)
        self.down = linear(hidden_width, width)
        self.dropout = dropout

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        return self.down(F.dropout(F.gelu(self.up(x)), self.dropout, self.training))


class SquaredReluFeedForward(nn.Module):
    """down(dropout(relu(up(x))^2)), without biases.

    Args:
        width: d.
        hidden_width: of what lies between the two matrices.
        dropout: on the hidden units, in training.

    Shapes: x (..., d) to (..., d).

    Source: So et al. 2021, squared ReLU.
    """

    def __init__(self, width: int, *, hidden_width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.up = linear(width, hidden_width, bias=False)
        self.down = linear(hidden_width, width, bias=False)
        self.dropout = dropout

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        return self.down(F.dropout(self.up(x).relu().square(), self.dropout, self.training))
