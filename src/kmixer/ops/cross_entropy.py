"""Cross-entropy of logits under a soft cap, fused on a CPU where the compiled kernels are built."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from kmixer import native
from kmixer.errors import InputError
from kmixer.ops.checks import FLOATS, check_tensors
from kmixer.ops.gradients import HandWritten, first_order


def soft_capped(logits: Tensor, cap: float | None) -> Tensor:
    """cap tanh(logits / cap): logits between -cap and cap; as they are for no cap."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


def cross_entropies(
    logits: Float[Tensor, "*rows v"], targets: Int[Tensor, "*rows"], cap: float | None = None
) -> Float[Tensor, "*rows"]:
    """-log softmax(soft_capped(logits, cap))[target] in nats for every row, in float32 or better.

    Raises InputError for logits that are not real floats, targets on another device, and a target that is not in
    0..v - 1, where the compiled kernels are built and targets on a CPU.
    """
    check_tensors("cross_entropies", logits=logits)
    if logits.device != targets.device:
        raise InputError(
            f"cross_entropies: got logits on {logits.device}, targets on {targets.device}; both are on one device"
        )
    accurate = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if targets.numel() and native.plain(targets) and native.usable(accurate, dtypes=FLOATS):
        lowest, highest = (int(x) for x in torch.aminmax(targets))
        if lowest < 0 or highest >= logits.shape[-1]:
            raise InputError(f"targets: got {lowest}..{highest}; allowed: 0..{logits.shape[-1] - 1}")
        if accurate.dtype == torch.float32 and targets.shape == logits.shape[:-1]:
            return _CrossEntropy.apply(accurate.contiguous(), targets.to(torch.int64).contiguous(), float(cap or 0))
    flat = soft_capped(accurate, cap).flatten(0, -2)
    return F.cross_entropy(flat, targets.flatten(), reduction="none").view(targets.shape)


class _CrossEntropy(HandWritten):
    """Keeps the logits and two numbers per row; torch's operators keep every step as a tensor of that size."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, cap: float) -> Tensor:
        width = logits.shape[-1]
        losses, highest, sums = (logits.new_empty(targets.shape) for _ in range(3))
        native.call("cross_entropy_forward", logits, targets, losses, highest, sums, targets.numel(), width, cap)
        ctx.save_for_backward(logits, targets, highest, sums)
        ctx.cap = cap
        return losses

    @staticmethod
    @first_order
    def backward(ctx: Any, dlosses: Tensor) -> Any:
        logits, targets, highest, sums = ctx.saved_tensors
        dlogits = torch.empty_like(logits)
        arguments = (targets.numel(), logits.shape[-1], ctx.cap)
        kept = (logits, targets, highest, sums)
        native.call("cross_entropy_backward", *kept, dlosses.contiguous(), dlogits, *arguments)
        return dlogits, None, None
