"""A program: compile the layers of a stack, and compare them with themselves at several lengths.

A process of its own, since the annotation checks of the test run are opaque to torch.compile.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import torch._dynamo

from kmixer.models import KStack, ModelConfig, TransformerConfig
from kmixer.models.transformer import Transformer


def results(stack: Any, inputs: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    found = []
    for h in inputs:
        y, _ = stack(h)
        parameters = [p for p in stack.parameters() if p.requires_grad]
        found.append([y.detach(), *torch.autograd.grad(y.sin().sum(), parameters)])
    return found


def main(kind: str, settings: dict[str, Any]) -> None:
    values = {"width": 16, "layers": 3, **settings}
    stack: Any
    if kind == "k-stack":
        stack = KStack(ModelConfig.parse(values, source="test"))
    else:
        stack = Transformer(TransformerConfig.parse({"heads": 2, **values}, source="test"))
    inputs = [torch.randn(b, t, 16, requires_grad=True) for b, t in ((2, 20), (3, 33), (2, 64), (5, 71))]
    expected = results(stack, inputs)
    torch._dynamo.utils.counters.clear()
    stack.compile_layers(backend="aot_eager")
    for actual, exact in zip(results(stack, inputs), expected, strict=True):
        torch.testing.assert_close(actual, exact, rtol=1e-4, atol=1e-4)
    print(torch._dynamo.utils.counters["stats"]["unique_graphs"])


if __name__ == "__main__":
    torch.manual_seed(0)
    main(sys.argv[1], json.loads(sys.argv[2]))
