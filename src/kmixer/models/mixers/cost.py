"""Sums that the cards of several mixers are made of: operations, a multiply and an add being two, and numbers kept."""

from __future__ import annotations

from torch import nn

from kmixer.layers import BaseKernel
from kmixer.layers.depthwise_convolution import DepthwiseConvolution


def linear_operations(module: nn.Module | None) -> float:
    """Of every linear map in it, each used once a token."""
    parts = [] if module is None else module.modules()
    return sum(2.0 * part.weight.numel() for part in parts if isinstance(part, nn.Linear))


def convolution_operations(convolution: DepthwiseConvolution | None) -> float:
    """Of a causal convolution; none without one."""
    return 0.0 if convolution is None else 2.0 * convolution.filter.numel()


def tail_numbers(convolution: DepthwiseConvolution | None) -> int:
    """Numbers of the inputs that a convolution keeps; none without one."""
    return 0 if convolution is None else (convolution.taps - 1) * len(convolution.filter)


def kernel_operations(kernel: BaseKernel | None, window: int, width: int) -> float:
    """Of a base kernel on `width` channels."""
    if kernel is None:
        return 0.0
    if kernel.kind == "low_rank":
        return 6.0 * kernel.weights[0].shape[1] * width
    return 2 * mean_reach(len(kernel.weights[0]), window) * width


def keys_seen(reach: int | None, window: int, *, causal: bool, every_key: bool) -> float:
    """How many keys a position is held against: all that its layer reaches, or the mean of what is before it."""
    reach = min(reach or window, window)
    return reach if every_key or not causal else mean_reach(reach, window)


def mean_reach(lags: int, window: int) -> float:
    """Mean over the positions of a window of how many inputs a causal filter with `lags` lags reads."""
    lags = min(lags, window)
    return lags - lags * (lags - 1) / (2 * window)
