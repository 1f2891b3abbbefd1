"""Which mixers a prepared decoding step knows, by type, and the operations of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from kmixer.generation.mixers.gaussian import gaussian_operations
from kmixer.generation.mixers.k2 import k2_operations
from kmixer.generation.mixers.softmax import softmax_operations
from kmixer.generation.operations import Mixed, Place, Program
from kmixer.layers import GaussianAttention, K2Mixer, SoftmaxAttention

# From the normed input to what was mixed, before the last matrix: (program, mixer, normed, mixed, place).
MIXERS: Mapping[type[nn.Module], Callable[[Program, Any, int, int, Place], Mixed]] = {
    SoftmaxAttention: softmax_operations,
    GaussianAttention: gaussian_operations,
    K2Mixer: k2_operations,
}
