"""Giving the layers of a model fast weights, of a fresh one and of a trained one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import nn

from kmixer.errors import InputError
from kmixer.layers.block import Block
from kmixer.layers.fast_weights import FastWeights

Chosen = Literal["every"] | Sequence[int] | None


def attach_fast_weights(model: nn.Module, layers: Chosen = None, **settings: Any) -> nn.Module:
    """Give mixing layers of a language model fast weights, and its configuration the section `fast_weights`.

    With `init="zero"`, the default, the model computes what it computed before, exactly, until it is trained.

    Args:
        model: a `CausalLM`, changed and returned.
        layers: numbers of mixing layers from 0, or "every"; None is the last and the middle one.
        settings: the keyword arguments of `FastWeights`.

    Raises InputError for settings or layers that are not allowed, a model that has fast weights, and one without a
    stack of blocks with feed-forward layers.
    """
    config: Any = getattr(model, "config", None)
    blocks: Any = getattr(getattr(model, "stack", None), "blocks", None)
    if not isinstance(blocks, nn.ModuleList) or "fast_weights" not in getattr(type(config), "model_fields", {}):
        raise InputError(f"model: got {type(model).__name__}; allowed: a language model, a stack of blocks inside")
    if config.fast_weights is not None:
        raise InputError("model: it has fast weights; take one without")
    section = {key: list(value) if isinstance(value, tuple | range) else value for key, value in settings.items()}
    section["layers"] = layers if layers is None or isinstance(layers, str) else list(layers)
    config = type(config).parse({**config.model_dump(), "fast_weights": section}, source="attach_fast_weights")
    put_fast_weights(blocks, config.fast_weights.chosen(config.layers), **config.fast_weights.options())
    model.config = config
    if hasattr(model.stack, "config"):
        model.stack.config = config  # type: ignore[union-attr, assignment]
    return model


def put_fast_weights(blocks: nn.ModuleList, layers: Sequence[int], **settings: Any) -> None:
    """Give the feed-forward layers of the blocks with these numbers fast weights, where and as their weights are."""
    for layer in layers:
        block = blocks[layer]
        feed_forward: Any = block.feed_forward if isinstance(block, Block) else None
        if not hasattr(feed_forward, "fast"):
            raise InputError(f"fast weights: layer {layer} has no feed-forward layer that takes them")
        width, hidden_width = feed_forward.down.weight.shape
        feed_forward.fast = FastWeights(width, hidden_width, **settings).to(feed_forward.down.weight)


def chosen_layers(layers: Chosen, count: int) -> tuple[int, ...]:
    """The numbers of the layers that have fast weights, of so many.

    Raises InputError for a layer that is not there, or is named twice.
    """
    if layers is None:
        return tuple(sorted({(count - 1) // 2, count - 1}))
    if layers == "every":
        return tuple(range(count))
    if len(set(layers)) < len(layers) or not all(isinstance(layer, int) and 0 <= layer < count for layer in layers):
        raise InputError(f"fast_weights.layers: got {list(layers)}; allowed: different numbers from 0 to {count - 1}")
    return tuple(sorted(layers))  # type: ignore[arg-type]
