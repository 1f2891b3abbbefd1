"""Floating-point operations and state of a model, counted from its shapes: a multiply and an add are two."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kmixer.layers import BaseKernel, GaussianAttention, HierarchicalAttention, K2Mixer, SoftmaxAttention
from kmixer.layers.depthwise_convolution import DepthwiseConvolution
from kmixer.models.causal_lm import CausalLM
from kmixer.models.heads import AdaptiveHead, LinearHead
from kmixer.models.k_stack import KStack
from kmixer.ops.base_kernel import LowRankState


def count_flops(model: CausalLM, window: int, *, every_key: bool = False) -> float:
    """Operations of the forward pass a token, averaged over the positions of a window.

    Counted: matrix products, the decay path as its recurrence (6 r d), base kernels and attention
    below the diagonal. Not counted: norms, activations, additions, look-ups, and all but the first
    band of an adaptive head. A training step takes three times as many.

    Args:
        model: the model; one on the meta device will do.
        window: positions of a sequence.
        every_key: count attention as papers do: every position against the whole window, or against
            the window of its layer, though it sees half of it.
    """
    stack, head = model.stack, model.head
    inside = linear_flops(stack) + mixing_flops(stack, window, every_key=every_key)
    if isinstance(stack, KStack):
        if stack.shared_kernel is not None:
            inside += len(stack.blocks) * _kernel_flops(stack.shared_kernel, window, model.config.width)
        inside *= stack.passes
    outside = linear_flops(model.from_embedding)
    outside += linear_flops(head.softmax.head if isinstance(head, AdaptiveHead) else head)
    if isinstance(head, LinearHead):
        outside += 2 * model.embedding.weight.numel()
    return inside + outside


def matrix_parameters(module: nn.Module) -> int:
    """Parameters of the matrices of linear maps."""
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))


def linear_flops(module: nn.Module) -> float:
    """Operations of every linear map a token."""
    inside = {
        id(part) for layer in module.modules() if isinstance(layer, HierarchicalAttention) for part in layer.modules()
    }
    return sum(
        2.0 * part.weight.numel()
        for part in module.modules()
        if isinstance(part, nn.Linear) and id(part) not in inside  # whose maps see fewer rows: see mixing_flops
    )


def _hierarchical_flops(layer: HierarchicalAttention, window: int, every_key: bool) -> float:
    """Linear maps on coarse rows, scores of every level, values; downsampling."""
    width = layer.heads * layer.head_width
    keys = window if every_key or not layer.causal else _mean_reach(window, window)
    flops = 2.0 * layer.out.weight.numel()
    for level in range(layer.levels):
        part = 0.5**level
        flops += part * 2 * layer.query_key_value[level].weight.numel()  # type: ignore[union-attr, operator]
        flops += part * part * 2 * keys * width
        if level < layer.value_levels:
            value_keys = part * part if layer.fusion == "output" else 1.0
            flops += value_keys * 2 * keys * width
    for level, module in enumerate(layer.downsample):
        flops += 0.5 ** (level + 1) * 2 * sum(p.numel() for p in module.parameters())
    if layer.convolution is not None:
        flops += 2 * layer.convolution.filter.numel()
    return flops


def mixing_flops(module: nn.Module, window: int, *, every_key: bool = False) -> float:
    """What the mixers do a token beside their linear maps; see `count_flops`."""
    flops = 0.0
    for part in module.modules():
        if isinstance(part, K2Mixer):
            flops += 4 * part.width * part.rank + 6 * part.rank * part.width
            if part.base_kernel is not None:
                flops += _kernel_flops(part.base_kernel, window, part.width)
        elif isinstance(part, HierarchicalAttention):
            flops += _hierarchical_flops(part, window, every_key)
        elif isinstance(part, SoftmaxAttention | GaussianAttention):
            reach = min(part.reach or window, window)
            keys = reach if every_key or not part.causal else _mean_reach(reach, window)
            flops += 4 * keys * part.heads * part.head_width
            if isinstance(part, SoftmaxAttention) and part.convolution is not None:
                flops += 2 * part.convolution.filter.numel()
    return flops


def cache_size(model: CausalLM) -> tuple[float, int]:
    """Numbers a sequence's state holds: (a token more, in all layers that keep it; whatever the length).

    A coarse level keeps a row for several tokens, so that a token more is a mean.

    Layers with a window keep their tokens only for as long as it reaches, and a dense base kernel, which keeps all
    of its inputs, ends at its size.
    """
    a_token, constant = 0.0, 0
    stack = model.stack
    shared = stack.shared_kernel if isinstance(stack, KStack) else None
    for part in stack.modules():
        if isinstance(part, SoftmaxAttention):
            a_token += 2 * part.heads * part.head_width
            constant += _tail_numbers(part.convolution)
        elif isinstance(part, GaussianAttention):
            a_token += (1 + part.keeps_values) * part.heads * part.head_width
        elif isinstance(part, HierarchicalAttention):
            width, levels = part.heads * part.head_width, range(part.levels)
            a_token += sum(width / 2**level for level in levels)  # keys
            a_token += sum(width / 2**level for level in levels[: part.value_levels])  # values
            constant += part.levels * width + (part.levels - 1) * (part.taps - 1) * width  # last queries; tails
            constant += _tail_numbers(part.convolution)
        elif isinstance(part, K2Mixer):
            with torch.device("meta"):
                kernel = part.base_kernel or shared
                state = None if kernel is None else kernel.initial_state(1, part.width)
            constant += part.rank * part.width
            if kernel is not None and kernel.kind == "dense":
                a_token += part.width
            if isinstance(state, Tensor):
                constant += state.numel()
            elif isinstance(state, LowRankState):
                constant += state.sums.numel()
    passes = stack.passes if isinstance(stack, KStack) else 1
    return passes * a_token, passes * constant


def _tail_numbers(convolution: DepthwiseConvolution | None) -> int:
    """Numbers of the inputs that a convolution keeps; none without one."""
    return 0 if convolution is None else (convolution.taps - 1) * len(convolution.filter)


def _kernel_flops(kernel: BaseKernel, window: int, width: int) -> float:
    if kernel.kind == "low_rank":
        return 6.0 * kernel.weights[0].shape[1] * width
    return 2 * _mean_reach(len(kernel.weights[0]), window) * width


def _mean_reach(lags: int, window: int) -> float:
    """Mean over the positions of a window of how many inputs a causal filter with `lags` lags reads."""
    lags = min(lags, window)
    return lags - lags * (lags - 1) / (2 * window)
