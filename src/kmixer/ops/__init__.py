"""Operators on tensors: no parameters, no configuration; state in, state out."""

from kmixer.ops.attention.gaussian import gaussian_attention
from kmixer.ops.attention.hierarchical import hierarchical_attention
from kmixer.ops.attention.sinkhorn import sinkhorn, sinkhorn_attention
from kmixer.ops.base_kernel import base_kernel
from kmixer.ops.decay.recurrence import decayed_linear_attention
from kmixer.ops.suffix_automaton import suffix_matches

__all__ = [
    "base_kernel",
    "decayed_linear_attention",
    "gaussian_attention",
    "hierarchical_attention",
    "sinkhorn",
    "sinkhorn_attention",
    "suffix_matches",
]
