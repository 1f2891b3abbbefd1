"""Elementwise neighbours of the mixers, fused on a CPU where the compiled kernels are built.

Each function is defined by one line of torch, which runs on every device; the compiled path agrees
with it but for dropout, where it draws from a generator of its own (seeded by torch's).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kmixer import native
from kmixer.native.dispatch import ELEMENTS
from kmixer.ops.gradients import HandWritten, first_order
from kmixer.ops.linear import compiled_linear, fits_cache, linear_map

# Elements of one dropout mask are numbered in 32 bits.
MAX_ELEMENTS = 1 << 32


def rms_norm(x: Float[Tensor, "*rows d"], weight: Float[Tensor, " d"] | None, eps: float) -> Float[Tensor, "*rows d"]:
    """weight x / sqrt(mean(x^2) + eps) over the last axis; without a weight, x / sqrt(mean(x^2) + eps)."""
    return keep_and_rms_norm(x, weight, eps)[1]


def keep_and_rms_norm(
    x: Float[Tensor, "*rows d"], weight: Float[Tensor, " d"] | None, eps: float
) -> tuple[Float[Tensor, "*rows d"], Float[Tensor, "*rows d"]]:
    """x and rms_norm(x), for a layer that adds to its input: one pass makes the gradient of both."""
    if native.usable(x, dtypes=ELEMENTS) and (
        weight is None or (native.usable(weight) and weight.shape == x.shape[-1:])
    ):
        weight = x.new_ones(x.shape[-1], dtype=torch.float32) if weight is None else weight.contiguous()
        return _RMSNorm.apply(x.contiguous(), weight, eps)
    return x, F.rms_norm(x, x.shape[-1:], weight, eps)


def dropout(x: Tensor, probability: float) -> Tensor:
    """x with each element set to 0 with this probability, in force as given, and the rest scaled up."""
    if probability and native.usable(x, dtypes=ELEMENTS) and x.numel() < MAX_ELEMENTS:
        return _Dropout.apply(x.contiguous(), probability, dropout_seed(probability))
    return _dropped(x, probability)


def normalize(x: Float[Tensor, "*rows r"], eps: float) -> Float[Tensor, "*rows r"]:
    """x / max(|x|, eps) over the last axis."""
    if native.usable(x):
        return _Normalize.apply(x.contiguous(), eps)
    return F.normalize(x, dim=-1, eps=eps)


def silu_gate(x: Float[Tensor, "*rows d"], gate: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
    """x SiLU(gate), element by element."""
    if native.usable(x, gate, dtypes=ELEMENTS) and x.dtype == gate.dtype and x.shape == gate.shape:
        return _SiluGate.apply(x.contiguous(), gate.contiguous())
    return x * F.silu(gate)


def linear_gelu_dropout(x: Tensor, weight: Tensor, bias: Tensor, dropout: float) -> Tensor:
    """dropout(GELU(x W^T + bias)), the exact GELU; `dropout` is the probability in force, 0 in evaluation."""
    if _numbered(x, bias) and bias.shape == weight.shape[:1]:
        return _BiasGeluDropout.apply(linear_map(x, weight), bias.contiguous(), dropout, dropout_seed(dropout))
    return _dropped(F.gelu(F.linear(x, weight, bias)), dropout)


def linear_dropout_add(residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor, dropout: float) -> Tensor:
    """residual + dropout(x W^T + bias)."""
    known = _numbered(x, bias) and native.usable(residual, dtypes=(native.product_dtype(),))
    if known and bias.shape == weight.shape[:1] and residual.shape == (*x.shape[:-1], len(bias)):
        seed = dropout_seed(dropout)
        if fits_cache(x, weight, bias):
            return compiled_linear(x, weight, bias, residual, dropout_arguments(dropout, seed))
        mapped = F.linear(x, weight)
        return _BiasDropoutAdd.apply(residual.contiguous(), mapped, bias.contiguous(), dropout, seed)
    return residual + _dropped(F.linear(x, weight, bias), dropout)


def scaled_norm_add(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x + rms_norm(x) + bias, with the norm's weight."""
    kept, normed = keep_and_rms_norm(x, weight, eps)
    if _numbered(normed, bias) and normed.dtype == kept.dtype and bias.shape == x.shape[-1:]:
        return _BiasDropoutAdd.apply(kept.contiguous(), normed, bias.contiguous(), 0.0, 0)
    return kept + normed + bias


def _numbered(x: Tensor, bias: Tensor) -> bool:
    """Whether an elementwise kernel can take x after a linear map to the bias's width, and number its elements."""
    # Sizes come last: under torch.export a question about them would bound the batch size.
    return (
        native.usable(x, dtypes=ELEMENTS)
        and native.usable(bias)
        and x.numel() // x.shape[-1] * len(bias) < MAX_ELEMENTS
    )


def _dropped(x: Tensor, probability: float) -> Tensor:
    """F.dropout, which torch.vmap refuses even where nothing is dropped."""
    return F.dropout(x, probability) if probability else x


def dropout_seed(dropout: float) -> int:
    """A seed for the compiled dropout, drawn from torch's generator where anything is dropped."""
    return int(torch.randint(1 << 32, ())) if dropout else 0


def dropout_arguments(dropout: float, seed: int) -> tuple[int, int, float]:
    """Seed, threshold and scale as the compiled kernels take them."""
    threshold = min(round(dropout * 2**32), 2**32 - 1)
    scale = 1 / (1 - dropout) if dropout < 1 else 0.0  # where all is dropped
    return seed, threshold, scale


def rows_of(x: Tensor) -> tuple[int, int]:
    """How many rows, and their width: as the kernels take them."""
    return x.numel() // x.shape[-1], x.shape[-1]


class _RMSNorm(HandWritten):
    """x itself and its norm: the gradient that comes back through x is added where the norm's is made."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        rows, width = rows_of(x)
        y, inverse = torch.empty_like(x), weight.new_empty(rows)
        native.call("rms_norm_forward", x, weight, y, inverse, rows, width, eps)
        ctx.save_for_backward(x, weight, inverse)
        ctx.set_materialize_grads(False)
        return x.view_as(x), y

    @staticmethod
    @first_order
    def backward(ctx: Any, residual: Tensor | None, dy: Tensor | None) -> Any:
        if dy is None:
            return residual, None, None
        x, weight, inverse = ctx.saved_tensors
        residual = None if residual is None else residual.contiguous()
        dx, dweight = torch.empty_like(x), torch.empty_like(weight)
        native.call("rms_norm_backward", x, weight, inverse, dy.contiguous(), residual, dx, dweight, *rows_of(x))
        return dx, dweight, None


class _Normalize(HandWritten):
    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        rows, width = rows_of(x)
        y, inverse = torch.empty_like(x), x.new_empty(rows)
        native.call("normalize_forward", x, y, inverse, rows, width, eps)
        ctx.save_for_backward(y, inverse)
        ctx.eps = eps
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> Any:
        y, inverse = ctx.saved_tensors
        dx = torch.empty_like(y)
        native.call("normalize_backward", y, inverse, dy.contiguous(), dx, *rows_of(y), ctx.eps)
        return dx, None


class _Dropout(HandWritten):
    @staticmethod
    def forward(ctx: Any, x: Tensor, probability: float, seed: int) -> Tensor:
        y = torch.empty_like(x)
        native.call("dropout", x, y, *rows_of(x), *dropout_arguments(probability, seed))
        ctx.probability, ctx.seed = probability, seed
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> Any:
        dx = torch.empty_like(dy, memory_format=torch.contiguous_format)
        native.call("dropout", dy.contiguous(), dx, *rows_of(dy), *dropout_arguments(ctx.probability, ctx.seed))
        return dx, None, None


class _SiluGate(HandWritten):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor) -> Tensor:
        y = torch.empty_like(x)
        native.call("silu_gate_forward", x, gate, y, *rows_of(x))
        ctx.save_for_backward(x, gate)
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, gate = ctx.saved_tensors
        dx, dgate = torch.empty_like(x), torch.empty_like(gate)
        native.call("silu_gate_backward", x, gate, dy.contiguous(), dx, dgate, *rows_of(x))
        return dx, dgate


class _BiasGeluDropout(HandWritten):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, dropout: float, seed: int) -> Tensor:
        y = torch.empty_like(x)
        native.call("bias_gelu_dropout_forward", x, bias, y, *rows_of(x), *dropout_arguments(dropout, seed))
        ctx.save_for_backward(x, bias)
        ctx.dropout, ctx.seed = dropout, seed
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, bias = ctx.saved_tensors
        dx, dbias = torch.empty_like(x), torch.empty_like(bias)
        arguments = dropout_arguments(ctx.dropout, ctx.seed)
        native.call("bias_gelu_dropout_backward", x, bias, dy.contiguous(), dx, dbias, *rows_of(x), *arguments)
        return dx, dbias, None, None


class _BiasDropoutAdd(HandWritten):
    @staticmethod
    def forward(ctx: Any, residual: Tensor, x: Tensor, bias: Tensor, dropout: float, seed: int) -> Tensor:
        y = torch.empty_like(residual)
        arguments = dropout_arguments(dropout, seed)
        native.call("bias_dropout_add_forward", residual, x, bias, y, *rows_of(x), *arguments)
        ctx.dropout, ctx.seed = dropout, seed
        ctx.save_for_backward(bias)
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> Any:
        (bias,) = ctx.saved_tensors
        dy = dy.contiguous()
        dx, dbias = torch.empty_like(dy) if ctx.dropout else None, torch.empty_like(bias)
        arguments = dropout_arguments(ctx.dropout, ctx.seed)
        native.call("bias_dropout_add_backward", dy, dx, dbias, *rows_of(dy), *arguments)
        return dy, dy if dx is None else dx, dbias, None, None
