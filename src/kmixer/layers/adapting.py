"""Models with fast weights: which layers have them, whether they learn, whether they forget, and how far they moved."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from kmixer.errors import InputError
from kmixer.layers.fast_weights import FastState, FastWeights
from kmixer.state import State


def adaptive_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """The feed-forward layers of a model that have fast weights, with their names, in its order."""
    parts = model.named_modules()
    return [(name, part) for name, part in parts if isinstance(getattr(part, "fast", None), FastWeights)]


@contextlib.contextmanager
def adapting(model: nn.Module, on: bool, reset_every: int | None = None) -> Iterator[None]:
    """For the time of the block: whether fast weights learn, and after how many tokens they begin anew.

    Switched off, nothing is written: F stays what the state says, zero in a fresh one. A `reset_every` of None leaves
    what every layer has.

    Raises InputError for a reset interval below 1.
    """
    if reset_every is not None and reset_every < 1:
        raise InputError(f"reset_every: got {reset_every}; allowed: 1 token or more, or None")
    parts: list[FastWeights] = [layer.fast for _, layer in adaptive_layers(model)]
    before = [(part.adapts, part.reset_every) for part in parts]
    try:
        for part in parts:
            part.adapts = on
            part.reset_every = part.reset_every if reset_every is None else reset_every
        yield
    finally:
        for part, (adapts, interval) in zip(parts, before, strict=True):
            part.adapts, part.reset_every = adapts, interval


def check_stream(model: nn.Module) -> None:
    """Raises InputError for a model that cannot read a stream without end: it adapts and never forgets."""
    if (name := _never_forgets(model)) is not None:
        raise InputError(
            f"{name}: fast weights with tau = null grow as long as they are read, and ruin a stream; allowed: a "
            "reset_every, documents, or windows; or train with a tau"
        )


def forgets(model: nn.Module) -> bool:
    """Whether a model can read a stream without end, see `check_stream`."""
    return _never_forgets(model) is None


def _never_forgets(model: nn.Module) -> str | None:
    """The first layer whose fast weights grow for ever."""
    for name, layer in adaptive_layers(model):
        fast: FastWeights = layer.fast
        if fast.adapts and fast.decay_logit is None and fast.reset_every is None:
            return name
    return None


def relative_moves(model: nn.Module, state: State) -> list[tuple[str, Tensor]]:
    """|F| / |W_0| (b,) of every layer with fast weights in a state of the model, with its name; of every pass.

    Raises InputError for a state that is not of this model.
    """
    layers = adaptive_layers(model)
    states = list(_fast_states(state))
    if len(states) % max(1, len(layers)):
        raise InputError(f"state: got {len(states)} fast weights; allowed: those of the model's {len(layers)} layers")
    moves = []
    for index, fast in enumerate(states):
        name, layer = layers[index % len(layers)]
        norms = torch.linalg.vector_norm(fast.weights.detach(), dim=(1, 2))
        label = name.removesuffix(".feed_forward").removeprefix("stack.")
        label = label if len(states) == len(layers) else f"pass {index // len(layers)}, {label}"
        moves.append((label, norms / torch.linalg.vector_norm(layer.down.weight.detach().to(norms.dtype))))
    return moves


def _fast_states(state: State) -> Iterator[FastState]:
    if isinstance(state, FastState):
        yield state
    elif isinstance(state, tuple):
        for part in state:
            yield from _fast_states(part)
