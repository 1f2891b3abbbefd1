"""Weights as native/few_rows.h reads them: in panels of so many columns, zero beyond the last one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PANEL = 32  # columns: kPanel in native/few_rows.h


def whole(size: int, part: int = PANEL) -> int:
    """The next multiple of the part."""
    return -(-size // part) * part


def padded(tensor: Tensor, width: int) -> Tensor:
    """With zeros up to this width."""
    return F.pad(tensor, (0, width - tensor.shape[-1]))


def panels(weight: Tensor, bias: Tensor | None) -> Tensor:
    """Weights (outputs, inputs) as (panels, inputs + 1, PANEL), biases last."""
    outputs, inputs = weight.shape
    last = weight.new_zeros(outputs) if bias is None else bias
    columns = padded(torch.cat([weight, last[:, None]], dim=1).T, whole(outputs))
    return columns.reshape(inputs + 1, -1, PANEL).transpose(0, 1)
