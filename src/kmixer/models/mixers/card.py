"""What a mixer says of itself, all in one place, and where in a model it is to stand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import nn

from kmixer.config import StrictConfig

Settings = TypeVar("Settings", bound=StrictConfig)
Layer = TypeVar("Layer", bound=nn.Module)


@dataclass(frozen=True)
class Place:
    """Where a mixer stands: what the model around it decides."""

    width: int  # d
    causal: bool = True
    rotary: bool = True  # positions enter by rotation of keys; otherwise the model adds them to the input
    bias: bool = False  # of the matrices
    window: int | None = None  # positions it sees; None is all of them
    window_inclusive: bool = False
    value_embedding: bool = False

    def seen(self) -> dict[str, Any]:
        """What attention sees, as arguments of its layer."""
        names = ("causal", "rotary", "bias", "window", "window_inclusive")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class MixerCard(Generic[Settings, Layer]):
    """A mixer: y (b, t, d), state = layer(x (b, t, d), state), x normalised; the block around it adds the residual.

    Its layer says the roles of its parameters (`kmixer.layers.roles`) and offers what can be measured of it
    (`kmixer.layers.measured`). A configuration chooses it by its name and holds its settings under the same name.
    """

    name: str
    settings: type[Settings]  # every one with a default
    layer: type[Layer]
    build: Callable[[Settings, int, Place], Layer]  # settings, heads, place; fresh weights
    # Operations of the forward pass a token: (layer, window, *extra, every_key=False), its linear maps included.
    # `extra` is what the stack hands to the layer beside x and state; see also `kmixer.models.flops.count_flops`.
    operations: Callable[..., float]
    # Numbers of a sequence's state: (layer, *extra) -> (a token more, whatever the length).
    state_numbers: Callable[..., tuple[float, int]]
    state_grows: bool  # with every position, where no window ends it
    sees_both_ways: bool  # is built for a place that is not causal
    has_window: bool  # is built for a place with a window
    has_heads: bool = True
    refuses_causal: str = ""  # why it is built for no place that sees the past only; empty where it is
    takes_value_embeddings: bool = False
