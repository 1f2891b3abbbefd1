"""The causal base kernel with its parameters: owned by one K2 layer, or shared by a stack."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kmixer.errors import InputError, check_choice
from kmixer.layers.roles import TABLE, VECTOR, Role
from kmixer.ops.base_kernel import KINDS, Kind, State, base_kernel, initial_state, trail_of

Init = Literal["exponential", "uniform"]

# Rate of the exponential initialisation, per position of lag (Koneko's value).
INITIAL_RATE = 0.15


class BaseKernel(nn.Module):
    """A learned causal map over time, the same for every channel; see `kmixer.ops.base_kernel`.

    Args:
        kind: "dense" and "low_rank" end at position `size`; "toeplitz" and "conv" stream for ever.
        size: positions W (`dense`, `low_rank`) or lags (`toeplitz`, `conv`).
        rank: R of `low_rank`.
        init: "exponential" starts from exp(-0.15 lag), "uniform" from the mean of what has been
            seen; rows sum to 1 in both. `low_rank` starts from the best rank-R fit to that.

    Shapes: x (b, t, d) to y (b, t, d), and the state of `kmixer.ops.base_kernel`.
    Raises InputError for another kind or init, a size below 1, and positions past the end of one that ends.

    Source: Koneko 2026 (Zenodo 19004569 and 19136398), base kernel; Koneko's later code for "conv".
    """

    def __init__(self, kind: Kind, size: int, *, rank: int = 2, init: Init = "exponential") -> None:
        super().__init__()
        check_choice("base kernel", kind, KINDS)
        check_choice("init of the base kernel", init, get_args(Init))
        if size < 1:
            raise InputError(f"size of the base kernel: got {size}; allowed: 1 or more")
        self.kind = kind
        rate = INITIAL_RATE if init == "exponential" else 0.0
        if self.streams:
            weights: tuple[Tensor, ...] = (torch.softmax(-rate * torch.arange(size), dim=0),)
        else:
            lag = torch.arange(size)[:, None] - torch.arange(size)[None, :]
            matrix = torch.softmax(torch.where(lag >= 0, -rate * lag, -torch.inf), dim=1)
            weights = (matrix,) if kind == "dense" else _best_low_rank(matrix, rank)
        self.weights = nn.ParameterList(weights)

    @property
    def streams(self) -> bool:
        """Whether it is a filter, which streams for ever."""
        return self.kind in ("toeplitz", "conv")

    def roles(self) -> dict[str, Role]:
        return {name: TABLE if weight.ndim == 2 else VECTOR for name, weight in self.named_parameters()}

    def learned(self) -> dict[str, list[float]]:
        """The weights by lag."""
        return {"base_kernel": self.weights_by_lag()}

    def weights_by_lag(self) -> list[float]:
        """The weight of each lag: the filter itself, or the mean along each diagonal of a dense or low-rank kernel."""
        weights = [weight.detach() for weight in self.weights]
        if self.streams:
            return [float(weight) for weight in weights[0]]
        matrix = weights[0] if self.kind == "dense" else weights[0] @ weights[1].T
        return [float(torch.diagonal(matrix, -lag).mean()) for lag in range(len(matrix))]

    def initial_state(self, batch_size: int, width: int) -> State:
        """The state before the first position."""
        return initial_state(self.kind, tuple(self.weights), batch_size, width)

    def forward(
        self, x: Float[Tensor, "b t d"], state: State | None = None, gate: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """gate times the kernel applied to x; the gate () goes onto the weights, which are fewer than the outputs."""
        first, *others = self.weights
        scaled = first if gate is None else gate * first
        return base_kernel(x, (scaled, *others), kind=self.kind, state=state)

    def trail(self, x: Float[Tensor, "b t d"], state: State | None, after: State) -> Any:
        """Its trail over the inputs x, from the state before them and the one after."""
        return trail_of(x, tuple(self.weights), state, after)


def _best_low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U, V (W, rank) with U V^T closest to the matrix, its singular values split evenly."""
    u, s, vh = torch.linalg.svd(matrix)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, vh[:rank].T * root
