"""How the functions that stand in the place of norms are used: how strong their input is, how much of it is cut off."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from kmixer.layers.norms import PointwiseNorm

# |alpha x + shift| beyond which tanh and erf hardly change any more.
SATURATED = 2.0


class PointwiseNorms:
    """Hooks that measure every `DyT` and `Derf` of a model in one forward pass, in which each may be called again."""

    def __init__(self, model: nn.Module) -> None:
        self._norms = {name: part for name, part in model.named_modules() if isinstance(part, PointwiseNorm)}
        self._counts = {name: [0.0, 0.0, 0.0] for name in self._norms}  # elements, squares, saturated
        self._handles = [
            part.register_forward_pre_hook(self._note(part, self._counts[name])) for name, part in self._norms.items()
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def measured(self) -> dict[str, Any] | None:
        """By norm: its name, alpha, shift, the share of saturated elements, the root mean square of its input."""
        seen = {name: counts for name, counts in self._counts.items() if counts[0]}
        if not seen:
            return None
        return {
            "names": list(seen),
            "alpha": [self._norms[name].alpha.item() for name in seen],
            "shift": [_shift(self._norms[name]) for name in seen],
            "saturation": [saturated / count for count, _, saturated in seen.values()],
            "input": [math.sqrt(squares / count) for count, squares, _ in seen.values()],
        }

    def _note(self, norm: PointwiseNorm, counts: list[float]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def note(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            x: Tensor = inputs[0].detach()
            counts[0] += x.numel()
            counts[1] += float(x.double().square().sum())
            counts[2] += float(((norm.alpha * x + _shift(norm)).abs() > SATURATED).sum())

        return note


def _shift(norm: PointwiseNorm) -> float:
    return 0.0 if norm.shift is None else norm.shift.item()
