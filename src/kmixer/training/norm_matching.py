"""How a model begins whose norms do not see the scale of their input: matched to a batch, once, before its first step.

The stream of a fresh model is small (embeddings have a standard deviation of 0.02): tanh(0.5 x) of it is a hundredth of
what RMSNorm gives, every branch begins that weak, and the model hardly trains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kmixer.layers import K0
from kmixer.layers.norms import PointwiseNorm, root_mean_square
from kmixer.measure.evaluating import evaluating

# alpha times the root mean square of the stream, below which a run is told that its branches begin weak.
WEAK = 0.1


def match_norms(model: nn.Module, run: Callable[[], Any]) -> float | None:
    """Set alpha and gain of every `DyT` and `Derf` in a model, one after the other, as one forward pass reaches them.

    alpha = alpha_0 / rms(x) and gain = 1 / rms(f(alpha x)) for the x that reaches a norm first; what comes out of it
    then goes on, so that the norms behind it see what they will. In `K0`, whose norm has no gain, the gain is K0's own.

    Args:
        model: with fresh weights; its mode is afterwards what it was.
        run: calls the model on a batch.

    Returns:
        What `strength_of_first` then is.
    """
    strengths: list[float] = []

    def match(module: nn.Module, x: Tensor) -> None:
        if isinstance(module, PointwiseNorm):
            module.match(x)
            strengths.append(_strength(module, x))
        elif isinstance(module, K0) and isinstance(module.norm, PointwiseNorm):
            module.norm.match(x)
            if module.norm.gain is None:
                module.gain.data.fill_(1 / root_mean_square(module.norm(x)))

    read_outs = [part for part in model.modules() if isinstance(part, K0)]
    inside = {part.norm for part in read_outs}
    norms = [part for part in model.modules() if isinstance(part, PointwiseNorm) and part not in inside]
    _visit(model, [*read_outs, *norms], match, run)
    return strengths[0] if strengths else None


def strength_of_first(model: nn.Module, run: Callable[[], Any]) -> float | None:
    """alpha rms(x) at the first `DyT` or `Derf` that a forward pass reaches; None without one."""
    strengths: list[float] = []

    def measure(module: nn.Module, x: Tensor) -> None:
        assert isinstance(module, PointwiseNorm)
        strengths.append(_strength(module, x))

    _visit(model, [part for part in model.modules() if isinstance(part, PointwiseNorm)], measure, run)
    return strengths[0] if strengths else None


def _strength(norm: PointwiseNorm, x: Tensor) -> float:
    return abs(norm.alpha.item()) * root_mean_square(x)


@torch.no_grad()
def _visit(
    model: nn.Module, parts: Iterable[nn.Module], visit: Callable[[nn.Module, Tensor], None], run: Callable[[], Any]
) -> None:
    """Call `visit` with the parts of a model and their inputs, in the order in which one forward pass reaches them."""
    handles: dict[nn.Module, RemovableHandle] = {}

    def before(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        handles.pop(module).remove()  # the later passes of a refined stack go by the first
        visit(module, inputs[0])

    handles.update({part: part.register_forward_pre_hook(before) for part in parts})
    if not handles:
        return
    try:
        with evaluating(model):
            run()
    finally:
        for handle in handles.values():
            handle.remove()
