"""Floating-point operations and state of a model, counted from its shapes: a multiply and an add are two.

What a mixer takes is said by its card; here stand the linear maps around the mixers, and the sums.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from kmixer.models.causal_lm import CausalLM
from kmixer.models.heads import AdaptiveHead, LinearHead
from kmixer.models.k_stack import KStack
from kmixer.models.mixers.choice import mixers_in
from kmixer.models.mixers.cost import linear_operations


def count_flops(model: CausalLM, window: int, *, every_key: bool = False) -> float:
    """Operations of the forward pass a token, averaged over the positions of a window.

    Counted: matrix products, the decay path as its recurrence (6 r d), base kernels and attention
    below the diagonal. Not counted: norms, activations, additions, look-ups, and all but the first
    band of an adaptive head. A training step takes three times as many.

    Args:
        model: the model; one on the meta device will do.
        window: positions of a sequence.
        every_key: count attention as papers do: every position against the whole window, or against
            the window of its layer, though it sees half of it.
    """
    stack, head = model.stack, model.head
    inside = _passes(stack) * operations(stack, window, *_handed_to_mixers(stack), every_key=every_key)
    outside = linear_operations(model.from_embedding)
    outside += linear_operations(head.softmax.head if isinstance(head, AdaptiveHead) else head)
    if isinstance(head, LinearHead):
        outside += 2 * model.embedding.weight.numel()
    return inside + outside


def operations(module: nn.Module, window: int, *extra: Any, every_key: bool = False) -> float:
    """Of the mixers in a module and of the linear maps around them a token; `extra` is handed to the mixers."""
    mixers = list(mixers_in(module))
    inside = {id(part) for _, layer in mixers for part in layer.modules()}
    around = sum(
        2.0 * part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear) and id(part) not in inside
    )
    return around + sum(card.operations(layer, window, *extra, every_key=every_key) for card, layer in mixers)


def matrix_parameters(module: nn.Module) -> int:
    """Parameters of the matrices of linear maps."""
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))


def cache_size(model: CausalLM) -> tuple[float, int]:
    """Numbers a sequence's state holds: (a token more, in all layers that keep it; whatever the length).

    Layers with a window keep their tokens only for as long as it reaches.
    """
    stack = model.stack
    numbers = [card.state_numbers(layer, *_handed_to_mixers(stack)) for card, layer in mixers_in(stack)]
    a_token, constant = (sum(column) for column in zip(*numbers, strict=True))
    return _passes(stack) * a_token, _passes(stack) * int(constant)


def _passes(stack: nn.Module) -> int:
    """How often its layers are gone through, each time with a state of their own."""
    return stack.passes if isinstance(stack, KStack) else 1


def _handed_to_mixers(stack: nn.Module) -> tuple[Any, ...]:
    """What a stack owns and hands to every mixer, beside x and state."""
    shared = stack.shared_kernel if isinstance(stack, KStack) else None
    return () if shared is None else (shared,)
