"""Floating-point operations and state of a model, counted from its shapes: a multiply and an add are two.

What a mixer takes is said by its card; here stand the linear maps around the mixers, and the sums.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from kmixer.layers.fast_weights import FastWeights
from kmixer.models.causal_lm import CausalLM
from kmixer.models.heads import AdaptiveHead, LinearHead
from kmixer.models.k_stack import KStack
from kmixer.models.mixers.choice import mixers_in
from kmixer.models.mixers.cost import linear_operations

# Bytes of a number of a state, bfloat16; of a token that is remembered, int64; of a fast weight, float32.
NUMBER_BYTES, TOKEN_BYTES, FAST_BYTES = 2, 8, 4


def count_flops(model: CausalLM, window: int, *, every_key: bool = False) -> float:
    """Operations of the forward pass a token, averaged over the positions of a window.

    Counted: matrix products, the decay path as its recurrence (6 r d), base kernels and attention
    below the diagonal, of a copy memory the product after its table and a pointer's dot product; of fast
    weights what is read, written and made of the targets, as if every chunk were full and had one before it.
    Not counted: norms, activations, additions, look-ups in tables, and all but the first band of an
    adaptive head. A training step takes three times as many.

    Args:
        model: the model; one on the meta device will do.
        window: positions of a sequence.
        every_key: count attention as papers do: every position against the whole window, or against
            the window of its layer, though it sees half of it.
    """
    stack, head = model.stack, model.head
    inside = _passes(stack) * operations(stack, window, *_handed_to_mixers(stack), every_key=every_key)
    outside = linear_operations(model.from_embedding) + linear_operations(model.copy_memory)
    if model.pointer is not None:
        outside += 2 * model.pointer.direction.numel()
    outside += linear_operations(head.softmax.head if isinstance(head, AdaptiveHead) else head)
    if isinstance(head, LinearHead):
        outside += 2 * model.embedding.weight.numel()
    return inside + outside


def operations(module: nn.Module, window: int, *extra: Any, every_key: bool = False) -> float:
    """Of the mixers in a module, the linear maps around them and fast weights a token; `extra` is for the mixers."""
    mixers = list(mixers_in(module))
    inside = {id(part) for _, layer in mixers for part in layer.modules()}
    around = sum(
        2.0 * part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear) and id(part) not in inside
    )
    around += sum(_fast_operations(part) for part in module.modules() if isinstance(part, FastWeights))
    return around + sum(card.operations(layer, window, *extra, every_key=every_key) for card, layer in mixers)


def matrix_parameters(module: nn.Module) -> int:
    """Parameters of the matrices of linear maps."""
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))


def state_bytes(model: CausalLM, number_bytes: int = NUMBER_BYTES) -> tuple[float, int]:
    """Bytes of a sequence's state: (a token more, in all layers that keep it; whatever the length).

    Layers with a window keep their tokens only for as long as it reaches. A copy memory of M tokens is counted at its
    fullest, 8 M bytes; one without end grows by 8 bytes per token. Fast weights are float32, and counted with the
    fullest chunk that is not finished. Counts of positions are left out.

    Args:
        model: the model; one on the meta device will do.
        number_bytes: of a number that is no token and no fast weight.
    """
    stack = model.stack
    numbers = [card.state_numbers(layer, *_handed_to_mixers(stack)) for card, layer in mixers_in(stack)]
    a_token, constant = (_passes(stack) * number_bytes * sum(column) for column in zip(*numbers, strict=True))
    fast = [part for part in stack.modules() if isinstance(part, FastWeights)]
    constant += _passes(stack) * sum(_fast_bytes(part, number_bytes) for part in fast)
    if model.copy_memory is not None:
        a_token += 0 if model.copy_memory.memory else TOKEN_BYTES
        constant += TOKEN_BYTES * (model.copy_memory.memory or 0)
    return a_token, int(constant)


def _fast_operations(fast: FastWeights) -> float:
    """Reading, writing, W_t and the filter. The token form is a recurrence as K2's, 6 d f."""
    d, f = fast.width, fast.hidden_width
    if fast.filter is None:
        return 6.0 * d * f + 2.0 * d * d
    return 4.0 * d * f + 2.0 * d * d + 2.0 * fast.filter.numel()


def _fast_bytes(fast: FastWeights, number_bytes: int) -> int:
    d, f = fast.width, fast.hidden_width
    kept = f if fast.filter is None else (fast.chunk - 1) * (d + f)
    return FAST_BYTES * d * f + number_bytes * kept


def _passes(stack: nn.Module) -> int:
    """How often its layers are gone through, each time with a state of their own."""
    return stack.passes if isinstance(stack, KStack) else 1


def _handed_to_mixers(stack: nn.Module) -> tuple[Any, ...]:
    """What a stack owns and hands to every mixer, beside x and state."""
    shared = stack.shared_kernel if isinstance(stack, KStack) else None
    return () if shared is None else (shared,)
