"""A program: layers under torch.compile carry a state on, also of rows at different positions, in whole graphs.

Not hierarchical attention: which cell of a level a row stands in decides what runs.

A process of its own, since the annotation checks of the test run are opaque to torch.compile.
"""

from __future__ import annotations

from typing import Any

import torch

from kmixer.layers import BaseKernel, GaussianAttention, K2Mixer, SoftmaxAttention
from kmixer.state import join

WIDTH = 16
LAYERS = {
    "softmax": lambda: SoftmaxAttention(WIDTH, 2, convolution=3),
    "softmax with a window": lambda: SoftmaxAttention(WIDTH, 2, window=4),
    "gaussian": lambda: GaussianAttention(WIDTH, 2, value_source="pre_rope", exclude_self=True),
    "dense": lambda: K2Mixer(WIDTH, 3, base_kernel=BaseKernel("dense", 60)),
    "low rank": lambda: K2Mixer(WIDTH, 3, base_kernel=BaseKernel("low_rank", 60, rank=2)),
    "conv": lambda: K2Mixer(WIDTH, 3, base_kernel=BaseKernel("conv", 4)),
}


@torch.no_grad()
def check(name: str) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    layer: Any = LAYERS[name]()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    x = torch.randn(2, 40, WIDTH)
    state = join([layer(x[:1, :9])[1], layer(x[1:, :13])[1]])
    for t in (5, 1, 3, 1):
        expected, after = layer(x[:, :t], state)
        actual, state = compiled(x[:, :t], state)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        again, _ = layer(x[:, :1], state)  # a compiled call cuts no padding off, so that caches may be longer
        torch.testing.assert_close(again, layer(x[:, :1], after)[0], rtol=1e-4, atol=1e-4)


if __name__ == "__main__":
    for name in LAYERS:
        check(name)
