"""Feed-forward layers: the branch alone, position by position. A block normalises before it and adds after it.

With fast weights (`kmixer.layers.fast_weights`) a layer has a state: y, state = layer(x, state, source).
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kmixer import native
from kmixer.errors import InputError
from kmixer.layers.exactly import exactly
from kmixer.layers.fast_weights import FastState, FastWeights
from kmixer.layers.linear import Linear, linear


class _FeedForward(nn.Module):
    """down(hidden(x)): what feed-forward layers of all kinds have in common.

    Shapes: x (..., d) to (..., d). With fast weights x and the source (b, t, d) to (b, t, d), and a `FastState`.
    """

    down: Linear

    def __init__(self, width: int, hidden_width: int, dropout: float, fast: FastWeights | None) -> None:
        super().__init__()
        self.dropout = dropout
        self.fast: FastWeights | None = fast
        if fast is not None and (fast.width, fast.hidden_width) != (width, hidden_width):
            raise InputError(
                f"fast: got fast weights of width {fast.width} and hidden width {fast.hidden_width}; allowed: "
                f"{width} and {hidden_width}, as the layer has"
            )

    def hidden(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... f"]:
        """The hidden units Z, in training dropped."""
        raise NotImplementedError

    def forward(
        self,
        x: Float[Tensor, "... d"],
        state: FastState | None = None,
        source: Float[Tensor, "b t d"] | None = None,
        *,
        hidden: Float[Tensor, "b t f"] | None = None,
        trail: bool = False,
    ) -> Float[Tensor, "... d"] | tuple[Float[Tensor, "... d"], FastState]:
        """The layer; with fast weights, with the state after it. `source` is what their targets are made of.

        `hidden` is Z, where the caller has made it already.

        Raises InputError for fast weights that learn from what the stack reads, where that is not given.
        """
        hidden = self.hidden(x) if hidden is None else hidden
        fast, down = self.fast, self.down
        if fast is None:
            return down(hidden)  # type: ignore[no-any-return]
        targets = x if fast.source == "hidden" else source
        if targets is None:
            raise InputError("source: missing; fast weights with target 'embed' take what the stack reads, (b, t, d)")
        if exactly(down, Linear) and native.usable(hidden, down.weight, products=True):
            return fast(  # type: ignore[no-any-return]
                hidden, targets, down.weight, state, bias=down.bias, joined=True, trail=trail
            )
        added, state = fast(hidden, targets, down.weight, state, trail=trail)
        return down(hidden) + added, state


class FeedForward(_FeedForward):
    """down(dropout(GELU(up(x)))) with hidden width 2d, or the one given, and the exact GELU.

    Args:
        width: d.
        hidden_width: of what lies between the two matrices; 2 d when None.
        dropout: on the hidden units, in training.
        fast: fast weights on `down`, of these widths; None has none.

    Shapes: x (..., d) to (..., d).

    Source: Koneko 2026 (Zenodo 19004569 and 19136398), feed-forward part of K1 and K2.
    """

    def __init__(
        self, width: int, *, hidden_width: int | None = None, dropout: float = 0.0, fast: FastWeights | None = None
    ) -> None:
        hidden_width = hidden_width or 2 * width
        super().__init__(width, hidden_width, dropout, fast)
        self.up = linear(width, hidden_width)
        self.down = linear(hidden_width, width)

    def hidden(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... f"]:
        return F.dropout(F.gelu(self.up(x)), self.dropout, self.training)


class SquaredReluFeedForward(_FeedForward):
    """down(dropout(relu(up(x))^2)), without biases.

    Args:
        width: d.
        hidden_width: of what lies between the two matrices.
        dropout: on the hidden units, in training.
        fast: fast weights on `down`, of these widths; None has none.

    Shapes: x (..., d) to (..., d).

    Source: So et al. 2021, squared ReLU.
    """

    def __init__(self, width: int, *, hidden_width: int, dropout: float = 0.0, fast: FastWeights | None = None) -> None:
        super().__init__(width, hidden_width, dropout, fast)
        self.up = linear(width, hidden_width, bias=False)
        self.down = linear(hidden_width, width, bias=False)

    def hidden(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... f"]:
        return F.dropout(self.up(x).relu().square(), self.dropout, self.training)


class GatedFeedForward(_FeedForward):
    """down(dropout(SiLU(gate(x)) up(x))), without biases.

    Args:
        width: d.
        hidden_width: of what lies between the matrices.
        dropout: on the hidden units, in training.
        fast: fast weights on `down`, of these widths; None has none.

    Shapes: x (..., d) to (..., d).

    Source: Shazeer 2020, SwiGLU.
    """

    def __init__(self, width: int, *, hidden_width: int, dropout: float = 0.0, fast: FastWeights | None = None) -> None:
        super().__init__(width, hidden_width, dropout, fast)
        self.gate = linear(width, hidden_width, bias=False)
        self.up = linear(width, hidden_width, bias=False)
        self.down = linear(hidden_width, width, bias=False)

    def hidden(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... f"]:
        return F.dropout(F.silu(self.gate(x)) * self.up(x), self.dropout, self.training)
