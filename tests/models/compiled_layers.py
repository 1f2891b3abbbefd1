"""A program: compile the layers of stacks, and compare them with themselves at several lengths.

A process of its own, since the annotation checks of the test run are opaque to torch.compile. Prints how many
programs each stack was compiled to.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import torch._dynamo

from kmixer.models import KStack, ModelConfig, TransformerConfig
from kmixer.models.transformer import BlocksConfig, Transformer

LAYERS = 3


def results(stack: Any, inputs: list[torch.Tensor], *, copies: bool) -> list[list[torch.Tensor]]:
    found = []
    for h in inputs:
        y, _ = stack(h, added={layer: (h + layer).cos() for layer in range(LAYERS)} if copies else {})
        parameters = [p for p in stack.parameters() if p.requires_grad]
        found.append([y.detach(), *torch.autograd.grad(y.sin().sum(), parameters)])
    return found


def unique_graphs(kind: str, settings: dict[str, Any]) -> int:
    """How many programs a stack was compiled to; settings: those of its configuration, "dtype", "causal", "copies"."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    dtype = getattr(torch, settings.pop("dtype", "float32"))
    copies, causal = settings.pop("copies", False), settings.pop("causal", True)
    values = {"width": 16, "layers": LAYERS, **settings}
    stack: Any
    if kind == "k-stack":
        stack = KStack(ModelConfig.parse(values, source="test"))
    else:
        blocks = (TransformerConfig if causal else BlocksConfig).parse({"heads": 2, **values}, source="test")
        stack = Transformer(blocks, causal=causal)
    stack.to(dtype)
    inputs = [torch.randn(b, t, 16, dtype=dtype, requires_grad=True) for b, t in ((2, 20), (3, 33), (2, 64), (5, 71))]
    expected = results(stack, inputs, copies=copies)
    # The backward of a stack with operators of our own is traced too; that of torch's is torch's matter, and slow.
    own = kind == "k-stack" or settings["mixers"] in ("k2", "hierarchical", "sinkhorn")
    stack.compile_layers(backend="aot_eager" if own else "eager")
    for actual, exact in zip(results(stack, inputs, copies=copies), expected, strict=True):
        torch.testing.assert_close(actual, exact, rtol=1e-4, atol=1e-4)
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


if __name__ == "__main__":
    print(json.dumps([unique_graphs(sys.argv[1], settings) for settings in json.loads(sys.argv[2])]))
