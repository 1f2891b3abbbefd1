"""Operators on tensors: no parameters, no configuration; state in, state out."""

from kmixer.ops.base_kernel import base_kernel
from kmixer.ops.decay import decayed_linear_attention
from kmixer.ops.gaussian import gaussian_attention
from kmixer.ops.hierarchical import hierarchical_attention

__all__ = ["base_kernel", "decayed_linear_attention", "gaussian_attention", "hierarchical_attention"]
