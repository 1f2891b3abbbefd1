"""Layers: one mixer a file, usable on their own. Each takes a state and returns a state."""

from kmixer.layers.attach import attach_fast_weights
from kmixer.layers.base_kernel import BaseKernel
from kmixer.layers.block import Block, BlockState
from kmixer.layers.fast_weights import FastState, FastWeights
from kmixer.layers.feed_forward import FeedForward, GatedFeedForward, SquaredReluFeedForward
from kmixer.layers.gaussian_attention import GaussianAttention, GaussianCache
from kmixer.layers.hierarchical_attention import HierarchicalAttention, HierarchicalCache
from kmixer.layers.k_operators import K0, K1, K2, K1Mixer, K2Mixer, K2State
from kmixer.layers.norms import Derf, DyT, RMSNorm
from kmixer.layers.sinkhorn_attention import SinkhornAttention
from kmixer.layers.softmax_attention import KeyValueCache, SoftmaxAttention

__all__ = [
    "K0",
    "K1",
    "K2",
    "BaseKernel",
    "Block",
    "BlockState",
    "Derf",
    "DyT",
    "FastState",
    "FastWeights",
    "FeedForward",
    "GatedFeedForward",
    "GaussianAttention",
    "GaussianCache",
    "HierarchicalAttention",
    "HierarchicalCache",
    "K1Mixer",
    "K2Mixer",
    "K2State",
    "KeyValueCache",
    "RMSNorm",
    "SinkhornAttention",
    "SoftmaxAttention",
    "SquaredReluFeedForward",
    "attach_fast_weights",
]
