"""A short causal filter over time, of its own in every channel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kmixer.layers.roles import TABLE, Role


class DepthwiseConvolution(nn.Module):
    """y[i] = sum_{r < K} w_r * x[i - r], with zeros before the first position: a causal depthwise convolution.

    Args:
        width: d.
        taps: K.
        initial: the K weights every channel starts with, that of lag 0 first.

    Shapes: x (b, t, d) and the tail (b, K - 1, d) before it to y (b, t, d) and the next tail.
    """

    def __init__(self, width: int, taps: int, initial: Float[Tensor, " k"]) -> None:
        super().__init__()
        self.taps = taps
        self.filter = nn.Parameter(initial.repeat(width, 1))

    def roles(self) -> dict[str, Role]:
        return {"filter": TABLE}

    def initial_tail(self, batch_size: int) -> Float[Tensor, "b p d"]:
        """What stands before the first position."""
        return self.filter.new_zeros(batch_size, self.taps - 1, len(self.filter))

    def forward(
        self, x: Float[Tensor, "b t d"], tail: Float[Tensor, "b p d"]
    ) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b p d"]]:
        whole = torch.cat([tail.to(x.dtype), x], dim=1)
        kernel = self.filter.flip(-1)[:, None].to(x.dtype)  # weight r is of lag r
        y = F.conv1d(whole.mT, kernel, groups=x.shape[-1]).mT
        return y, whole[:, whole.shape[1] - self.taps + 1 :].clone()  # a view would keep all inputs in memory
