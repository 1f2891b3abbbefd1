"""Sixteen bits between the layers of a stack: what autocast leaves in float32 because it is no matrix product."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from kmixer import native


def narrowed(x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
    """What enters a stack, in bfloat16 where autocast makes its matrix products in bfloat16 and the kernels are built.

    Norms, activations, gates, decay, filters and residual sums then read and write 16 bits and compute in float32, and
    so do their gradients; states, parameters and their gradients stay float32. Elsewhere x itself.
    """
    # The kernels know of autocast's dtypes bfloat16 alone: see `native.usable`.
    return x.bfloat16() if torch.is_autocast_enabled("cpu") and native.usable(x) else x
