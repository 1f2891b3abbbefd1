"""What may stand in the place of a norm: one bounded function of every number, gain f(alpha x + shift) + bias.

Defined by one line of torch, which runs on every device; on a CPU in float32 a compiled kernel makes one pass of it.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from kmixer import native
from kmixer.native.dispatch import ELEMENTS
from kmixer.ops.fused import rows_of
from kmixer.ops.gradients import HandWritten, first_order

Function = Literal["tanh", "erf"]

# As native/norms.h counts norms; 0 is RMSNorm.
KINDS: dict[Function, int] = {"tanh": 1, "erf": 2}


class Pointwise(NamedTuple):
    """gain f(alpha x + shift) + bias, element by element. None is not there: a gain of 1, nothing added."""

    function: Function
    alpha: Float[Tensor, ""]
    shift: Float[Tensor, ""] | None = None
    gain: Float[Tensor, " d"] | None = None
    bias: Float[Tensor, " d"] | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """Those that are there."""
        return [tensor for tensor in self[1:] if tensor is not None]

    def fits(self, width: int) -> bool:
        """Whether its tensors are of this width."""
        return (
            self.alpha.ndim == 0
            and (self.shift is None or self.shift.ndim == 0)
            and all(vector is None or vector.shape == (width,) for vector in (self.gain, self.bias))
        )

    def packed(self, width: int) -> Float[Tensor, " 2*d+2"]:
        """Gain, bias, alpha and shift in one tensor, as the kernels take them."""
        gain = self.alpha.new_ones(width) if self.gain is None else self.gain
        bias = self.alpha.new_zeros(width) if self.bias is None else self.bias
        shift = self.alpha.new_zeros(1) if self.shift is None else self.shift.reshape(1)
        return torch.cat([gain, bias, self.alpha.reshape(1), shift])


def pointwise_norm(x: Float[Tensor, "*rows d"], norm: Pointwise) -> Float[Tensor, "*rows d"]:
    """gain f(alpha x + shift) + bias; what has 16 bits is computed in float32, and given back in 16."""
    return keep_and_pointwise_norm(x, norm)[1]


def keep_and_pointwise_norm(
    x: Float[Tensor, "*rows d"], norm: Pointwise
) -> tuple[Float[Tensor, "*rows d"], Float[Tensor, "*rows d"]]:
    """x and pointwise_norm(x), for a layer that adds to its input: one pass makes the gradient of both."""
    width = x.shape[-1]
    if native.usable(x, dtypes=ELEMENTS) and native.usable(*norm.tensors) and norm.fits(width):
        return _PointwiseNorm.apply(x.contiguous(), norm.packed(width), KINDS[norm.function])
    u = norm.alpha * x.to(torch.promote_types(x.dtype, norm.alpha.dtype))
    y = (torch.tanh if norm.function == "tanh" else torch.erf)(u if norm.shift is None else u + norm.shift)
    y = y if norm.gain is None else norm.gain * y
    return x, (y if norm.bias is None else y + norm.bias).to(x.dtype)


class _PointwiseNorm(HandWritten):
    """x itself and its norm: the gradient that comes back through x is added where the norm's is made."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, learned: Tensor, kind: int) -> tuple[Tensor, Tensor]:
        y = torch.empty_like(x)
        native.call("pointwise_norm_forward", x, learned, y, *rows_of(x), kind)
        ctx.save_for_backward(x, learned)
        ctx.kind = kind
        ctx.set_materialize_grads(False)
        return x.view_as(x), y

    @staticmethod
    @first_order
    def backward(ctx: Any, residual: Tensor | None, dy: Tensor | None) -> Any:
        if dy is None:
            return residual, None, None
        x, learned = ctx.saved_tensors
        residual = None if residual is None else residual.contiguous()
        dx, dlearned = torch.empty_like(x), torch.empty_like(learned)
        native.call(
            "pointwise_norm_backward", x, learned, dy.contiguous(), residual, dx, dlearned, *rows_of(x), ctx.kind
        )
        return dx, dlearned, None
