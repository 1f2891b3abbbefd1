"""Parts of a model made into parts of types that nobody knows, with an answer of their own."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

CHANGE = 1.25


def change(part: nn.Module) -> None:
    """Make a module one of a subclass whose answer is a quarter larger: the first tensor of it, where it has more."""
    kind = type(part)

    def forward(self: nn.Module, *arguments: Any, **more: Any) -> Any:
        answer = kind.forward(self, *arguments, **more)
        if isinstance(answer, dict):
            return {key: value * CHANGE for key, value in answer.items()}
        return answer * CHANGE if isinstance(answer, Tensor) else (answer[0] * CHANGE, *answer[1:])

    part.__class__ = type(f"Changed{kind.__name__}", (kind,), {"forward": forward})
