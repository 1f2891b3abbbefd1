"""Floating-point operations of a model, counted from its shapes: a multiply and an add are two."""

from __future__ import annotations

from torch import nn

from kmixer.layers import K2, BaseKernel, SoftmaxAttention
from kmixer.models.causal_lm import CausalLM
from kmixer.models.heads import AdaptiveHead, LinearHead
from kmixer.models.transformer import Transformer


def count_flops(model: CausalLM | Transformer, window: int) -> float:
    """Operations of the forward pass a token, averaged over the positions of a window.

    Counted: matrix products, the decay path as its recurrence (6 r d), base kernels and attention
    below the diagonal. Not counted: norms, activations, additions, look-ups, and all but the first
    band of an adaptive head. A training step takes three times as many.
    """
    if isinstance(model, Transformer):
        return _linear_flops(model) + _mixing_flops(model, window) + 2 * model.embedding.weight.numel()
    kernel = model.stack.shared_kernel
    shared = 0.0 if kernel is None else len(model.stack.mixers) * _kernel_flops(kernel, window, model.config.width)
    one_pass = _linear_flops(model.stack) + _mixing_flops(model.stack, window) + shared
    head = model.head
    outside = _linear_flops(model.from_embedding)
    outside += _linear_flops(head.softmax.head if isinstance(head, AdaptiveHead) else head)
    if isinstance(head, LinearHead):
        outside += 2 * model.embedding.weight.numel()
    return outside + model.stack.passes * one_pass


def _linear_flops(module: nn.Module) -> float:
    return sum(2.0 * part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))


def _mixing_flops(module: nn.Module, window: int) -> float:
    """What the mixers do beside their linear maps."""
    flops = 0.0
    for part in module.modules():
        if isinstance(part, K2):
            flops += 4 * part.width * part.rank + 6 * part.rank * part.width
            if part.base_kernel is not None:
                flops += _kernel_flops(part.base_kernel, window, part.width)
        elif isinstance(part, SoftmaxAttention):
            flops += 4 * _mean_reach(window, window) * part.heads * part.head_width
    return flops


def _kernel_flops(kernel: BaseKernel, window: int, width: int) -> float:
    if kernel.kind == "low_rank":
        return 6.0 * kernel.weights[0].shape[1] * width
    return 2 * _mean_reach(len(kernel.weights[0]), window) * width


def _mean_reach(lags: int, window: int) -> float:
    """Mean over the positions of a window of how many inputs a causal filter with `lags` lags reads."""
    lags = min(lags, window)
    return lags - lags * (lags - 1) / (2 * window)
