"""Weights as native/few_rows.h reads them: in panels of so many columns, zero beyond the last one.

In 16 bits weights are rounded to bfloat16; in 8 bits to 127 steps on either side of 0, the largest weight of every
output the last one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kmixer.models.causal_lm import DecodedIn

PANEL = 32  # columns: kPanel in native/few_rows.h
RANK_MULTIPLE = 16  # queries and keys of K2 come in as many: wide_rank in native/decode_state.h
PRECISIONS: dict[DecodedIn, int] = {"float32": 0, "bfloat16": 1, "int8": 2}  # Precision in native/few_rows.h
STEPS = 127


def whole(size: int, part: int = PANEL) -> int:
    """The next multiple of the part."""
    return -(-size // part) * part


def padded(tensor: Tensor, width: int) -> Tensor:
    """With zeros up to this width."""
    return F.pad(tensor, (0, width - tensor.shape[-1]))


def panels(weight: Tensor, bias: Tensor | None, precision: DecodedIn = "float32") -> Tensor:
    """Weights (outputs, inputs) as panels: float32 (panels, inputs + 1, PANEL), the biases last.

    In less precision bytes (panels, n): the weights, in 8 bits the scales, and the biases, both float32.
    """
    outputs, inputs = weight.shape
    columns = padded(weight.T, whole(outputs)).reshape(inputs, -1, PANEL).transpose(0, 1)
    last = columns.new_zeros(outputs) if bias is None else bias
    biases = padded(last, whole(outputs)).reshape(-1, 1, PANEL)
    if precision == "float32":
        return torch.cat([columns, biases], dim=1)
    if precision == "bfloat16":
        parts = [columns.bfloat16(), biases]
    else:
        scales = columns.abs().amax(1, keepdim=True) / STEPS
        steps = torch.where(scales > 0, columns / scales, 0).round().clamp(-STEPS, STEPS)
        parts = [steps.to(torch.int8), scales, biases]
    return torch.cat([part.contiguous().view(torch.uint8).flatten(1) for part in parts], dim=1)
