"""The residual block that every model is made of: any norm, any mixer, any feed-forward layer.

Where its parts are exactly those that a compiled kernel implements, the kernel runs; everything else is called.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kmixer.layers.exactly import exactly
from kmixer.layers.fast_weights import FastWeights
from kmixer.layers.feed_forward import FeedForward, SquaredReluFeedForward
from kmixer.layers.linear import Linear
from kmixer.layers.norms import FUSED, NORM_EPS
from kmixer.ops.feed_forward import Activation, feed_forward, hidden_units
from kmixer.ops.fused import linear_dropout_add
from kmixer.state import State
from kmixer.trail import asked_for


class BlockState(NamedTuple):
    """What a block carries: the state of its mixer and of its feed-forward layer, None where there is none."""

    mixer: State
    feed_forward: State = None


class Block(nn.Module):
    """x + mixer(norm(x)), then x + feed_forward(norm(x)).

    Args:
        mixing_norm, feed_forward_norm: a norm before each branch: (b, t, d) to (b, t, d).
        mixer: `y, state = mixer(x, state, *extra)`, with `initial_state(batch_size, *extra)`. Where a stack has a copy
            memory it is also given `added`, (b, t, d), for what it mixed before its last matrix; with `trail=True` it
            gives its trail in the place of its state.
        feed_forward: (b, t, d) to (b, t, d), position by position; with fast weights `y, state = feed_forward(x, state,
            source)`.
        mixing_dropout: on what the mixer adds, in training.
        drop_path: probability of leaving a branch out of an example, in training.
        projecting: a type of mixer that ends in a matrix, with `mix`, called as `forward` is, for all before it and
            `projection` for the matrix. Where the mixer is exactly of this type, the matrix, the dropout and the
            addition are one operation, which rounds and draws in its own way.

    Shapes: x (b, t, d) to (b, t, d), and a `BlockState`.

    A kernel takes the place of parts only where each of them is `exactly` of a type that the kernel implements.
    """

    def __init__(
        self,
        mixing_norm: nn.Module,
        mixer: nn.Module,
        feed_forward_norm: nn.Module,
        feed_forward: nn.Module,
        *,
        mixing_dropout: float = 0.0,
        drop_path: float = 0.0,
        projecting: type[nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.mixing_norm, self.mixer = mixing_norm, mixer
        self.feed_forward_norm, self.feed_forward = feed_forward_norm, feed_forward
        self.mixing_dropout, self.drop_path = mixing_dropout, drop_path
        self.projecting = projecting

    def initial_state(self, batch_size: int, *extra: object) -> BlockState:
        """The state before the first position; `extra` as in `forward`."""
        fast = self.fast_weights
        adaptive = None if fast is None else fast.initial_state(batch_size)
        return BlockState(self.mixer.initial_state(batch_size, *extra), adaptive)  # type: ignore[operator]

    @property
    def fast_weights(self) -> FastWeights | None:
        """Those of the feed-forward layer, if it has any."""
        fast = getattr(self.feed_forward, "fast", None)
        return fast if isinstance(fast, FastWeights) else None

    def forward(
        self,
        x: Float[Tensor, "... d"],
        state: BlockState | None = None,
        *extra: object,
        added: Float[Tensor, "... d"] | None = None,
        source: Float[Tensor, "... d"] | None = None,
        trail: bool = False,
    ) -> tuple[Float[Tensor, "... d"], BlockState]:
        """The block; `extra` and `added` are handed to the mixer: a base kernel, a value embedding; copied tokens.

        `source` is what the stack reads, of which fast weights make their targets. With `trail`, the trail is in the
        place of the state: see `kmixer.trail`.
        """
        more = asked_for(self.mixer, trail) if added is None else {"added": added, **asked_for(self.mixer, trail)}
        x, mixed = self._add_mixed(x, None if state is None else state.mixer, extra, more)
        if self.fast_weights is None:
            return self._add_feed_forward(x), BlockState(mixed)
        layer = self.feed_forward
        x, normed = _keep(x, self.feed_forward_norm)
        before = None if state is None else state.feed_forward
        more = asked_for(layer, trail)
        if exactly(layer, FeedForward) and exactly(up := layer.up, Linear) and up.bias is not None:
            dropout = layer.dropout if layer.training else 0.0
            more["hidden"] = hidden_units(normed, up.weight, up.bias, dropout=dropout)
        y, after = layer(normed, before, source, **more)
        return x + self._dropped(y), BlockState(mixed, after)

    def _add_mixed(
        self, x: Tensor, state: State, extra: tuple[object, ...], more: dict[str, Any]
    ) -> tuple[Tensor, State]:
        mixer = self.mixer
        x, normed = _keep(x, self.mixing_norm)
        projection = self._projection(mixer)
        if projection is not None:
            mixed, state = mixer.mix(normed, state, *extra, **more)  # type: ignore[operator]
            dropout = self.mixing_dropout if self.training else 0.0
            return linear_dropout_add(x, mixed, projection.weight, projection.bias, dropout), state
        mixed, state = mixer(normed, state, *extra, **more)
        return x + self._dropped(F.dropout(mixed, self.mixing_dropout, self.training)), state

    def _add_feed_forward(self, x: Tensor) -> Tensor:
        norm, layer = self.feed_forward_norm, self.feed_forward
        if (
            exactly(norm, *FUSED)
            and exactly(layer, FeedForward, SquaredReluFeedForward)
            and exactly(up := layer.up, Linear)
            and exactly(down := layer.down, Linear)
            and not self._drops_paths()
        ):
            weights = (norm.weights(), up.weight, up.bias, down.weight, down.bias)  # type: ignore[operator]
            dropout = layer.dropout if layer.training else 0.0
            activation: Activation = "gelu" if isinstance(layer, FeedForward) else "squared_relu"
            return feed_forward(x, *weights, eps=NORM_EPS, dropout=dropout, activation=activation)
        x, normed = _keep(x, norm)
        return x + self._dropped(layer(normed))

    def _projection(self, mixer: nn.Module) -> Linear | None:
        """The matrix that the mixer ends in, where one operation may take its place."""
        if self.projecting is None or not exactly(mixer, self.projecting) or self._drops_paths():
            return None
        projection = cast("nn.Module", mixer.projection)
        return projection if exactly(projection, Linear) and projection.bias is not None else None

    def _drops_paths(self) -> bool:
        return self.training and self.drop_path > 0

    def _dropped(self, branch: Tensor) -> Tensor:
        return drop_path(branch, self.drop_path) if self._drops_paths() else branch


def drop_path(x: Float[Tensor, "b *_ d"], probability: float) -> Float[Tensor, "b *_ d"]:
    """Leave a branch out for some of the examples of a batch, and scale it up for the others (Huang et al. 2016)."""
    kept = 1 - probability
    chosen = torch.rand(len(x), *(1 for _ in x.shape[1:]), device=x.device) < kept
    return x * chosen / kept


def _keep(x: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """x and norm(x); by one operation where the norm has it, so that the gradients of both are one pass."""
    if exactly(norm, *FUSED):
        return norm.keep(x)  # type: ignore[operator,no-any-return]
    return x, norm(x)
