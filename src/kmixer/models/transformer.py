"""The transformer: blocks of a mixer and a feed-forward layer, for softmax attention or any other mixer.

    x = x + mixer(norm(x)), then x = x + feed_forward(norm(x)), in every block

Positions enter by rotation inside attention only; K2 needs none. See `BlocksConfig` for the two kinds
of blocks, the windows and the value embeddings.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from kmixer.config import Positive
from kmixer.errors import InputError
from kmixer.layers import FeedForward, SquaredReluFeedForward
from kmixer.layers.block import Block, BlockState
from kmixer.layers.linear import INITIAL_STD
from kmixer.layers.roles import LOGIT, Role
from kmixer.layers.rotary import check_heads
from kmixer.models.mixers.card import Place
from kmixer.models.mixers.choice import MixersConfig, build_mixer, past_only
from kmixer.models.norm_config import NormPlace
from kmixer.models.stack_config import NOTHING, LayersConfig, StackConfig, adapting_to, added_to, has_fast_weights
from kmixer.ops.precision import narrowed
from kmixer.trail import asked_for

# One state a block.
TransformerState = tuple[BlockState, ...]

# Hidden widths are multiples of this, so that rows fill whole vectors of 8 float32.
HIDDEN_MULTIPLE = 8


class BlocksConfig(MixersConfig, LayersConfig):
    """Blocks of a mixer and a feed-forward layer.

    Blocks "plain": norms with weights, GELU feed-forward with biases. Blocks "nanochat": norms
    without weights (of the embedding too), relu^2 feed-forward without biases, and two scalars per layer
    that weigh the stream and the embedding it began with.
    """

    blocks: Literal["plain", "nanochat"] = "plain"
    mlp_multiplier: Annotated[float, Field(gt=0, le=1024)] = 4.0  # hidden width over d, rounded to eights
    rotary: bool = True  # positions rotate the keys of attention
    windows: Annotated[str, Field(pattern="^[SL]+$")] = "L"  # of the layers in turn, repeated: short, or the whole past
    window: Positive | None = None  # positions that a short layer sees
    window_inclusive: bool = False  # not counting the position itself
    value_embeddings: bool = False  # every second layer that can, the last included, adds one per token to its values

    @model_validator(mode="after")
    def _fits(self) -> BlocksConfig:
        if self.has_heads:
            check_heads(self.width, self.heads, rotary=self.rotary)
        if ("S" in self.windows) != (self.window is not None):
            raise ValueError(f"windows {self.windows!r} with window {self.window}; S layers need one, and only they do")
        for layer in range(self.layers):
            if self.window_of(layer) is not None and not self.card_of(layer).has_window:
                raise ValueError(f"windows: layer {layer} is short, and its mixer {self.mixer_of(layer)} has no window")
        return self

    def window_of(self, layer: int) -> int | None:
        """How many positions layer 0, 1, ... sees; None is the whole past."""
        return self.window if self.windows[layer % len(self.windows)] == "S" else None

    def has_value_embedding(self, layer: int) -> bool:
        """Whether layer 0, 1, ... adds value embeddings."""
        second = layer % 2 == (self.layers - 1) % 2
        return self.value_embeddings and second and self.card_of(layer).takes_value_embeddings

    @property
    def hidden_width(self) -> int:
        """Hidden units of a feed-forward layer."""
        return HIDDEN_MULTIPLE * max(1, round(self.mlp_multiplier * self.width / HIDDEN_MULTIPLE))


class TransformerConfig(BlocksConfig, StackConfig):
    """Blocks between an embedding and a head: a language model."""

    kind: Literal["transformer"] = "transformer"

    @model_validator(mode="after")
    def _sees_the_past(self) -> TransformerConfig:
        if self.refuses_causal is not None:
            raise ValueError(
                f"mixers: {self.refuses_causal}, and a language model sees the past only; allowed: {past_only()}"
            )
        return self

    @property
    def state_grows(self) -> bool:
        grows = (self.card_of(layer).state_grows and self.window_of(layer) is None for layer in range(self.layers))
        return super().state_grows or any(grows)


class Transformer(nn.Module):
    """The blocks of a `BlocksConfig`, from hidden vectors (b, t, d) to hidden vectors.

    The state of attention grows with every token, up to its window; that of K2 does not grow.

    Args:
        config: the model's configuration.
        vocabulary_size: v, for the tables of value embeddings where there are any.
        causal: positions see those before them only; otherwise all, and there is no state to carry on.
    """

    def __init__(self, config: BlocksConfig, vocabulary_size: int = 0, *, causal: bool = True) -> None:
        super().__init__()
        self.config = config
        layers = range(config.layers)
        self.blocks = nn.ModuleList(build_block(config, layer, causal=causal) for layer in layers)
        # nanochat: block i takes stream_scale_i x + input_scale_i x_0.
        scaled = config.blocks == "nanochat"
        self.input_norm = build_norm(config, "mixing") if scaled else nn.Identity()
        self.stream_scale = nn.Parameter(torch.ones(config.layers)) if scaled else None
        self.input_scale = nn.Parameter(torch.zeros(config.layers)) if scaled else None
        with_tables = [layer for layer in layers if config.has_value_embedding(layer)]
        self.value_embeddings = nn.ModuleDict(
            {str(layer): nn.Embedding(vocabulary_size, config.width) for layer in with_tables}
        )
        for table in self.value_embeddings.values():
            assert isinstance(table, nn.Embedding)
            nn.init.normal_(table.weight, std=INITIAL_STD)

    def roles(self) -> dict[str, Role]:
        return {} if self.stream_scale is None else {"stream_scale": LOGIT, "input_scale": LOGIT}

    def compile_layers(self, backend: str = "inductor") -> None:
        """Let torch.compile translate each kind of block once, for every block of it, batch size and length.

        Blocks with fast weights, which read positions, stay as they are.
        """
        for block in self.blocks:
            if not has_fast_weights(block):
                block.compile(dynamic=True, fullgraph=True, backend=backend)

    def initial_state(self, batch_size: int) -> TransformerState:
        """The state before the first position of `batch_size` sequences."""
        return tuple(block.initial_state(batch_size) for block in self.blocks)  # type: ignore[operator]

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        state: TransformerState | None = None,
        tokens: Int[Tensor, "b t"] | None = None,
        added: Mapping[int, Float[Tensor, "b t d"]] = NOTHING,
        *,
        source: Float[Tensor, "b t d"] | None = None,
        trail: bool = False,
    ) -> tuple[Float[Tensor, "b t d"], TransformerState]:
        """All blocks. `tokens` are those of x, for value embeddings; `added` goes to what layer 0, 1, ... mixes.

        `source` is what fast weights learn from: x where it is None, either after the norm of the input.
        """
        if self.value_embeddings and tokens is None:
            raise InputError("tokens: missing; this stack has value embeddings, which need them")
        x = first = self.input_norm(narrowed(x))
        source = x if source is None else self.input_norm(source)
        states = []
        for layer, block in enumerate(self.blocks):
            if self.stream_scale is not None and self.input_scale is not None:
                scale = self.stream_scale[layer]
                # In the precision of the scales, whose gradients are sums over all of x.
                x = narrowed(scale * x.to(scale.dtype) + self.input_scale[layer] * first.to(scale.dtype))
            key = str(layer)
            extra = (self.value_embeddings[key](tokens),) if key in self.value_embeddings else ()
            more = {**added_to(layer, added), **adapting_to(block, source), **asked_for(block, trail)}
            x, block_state = block(x, state[layer] if state else None, *extra, **more)
            states.append(block_state)
        return x, tuple(states)


def build_block(config: BlocksConfig, layer: int, *, causal: bool = True) -> Block:
    """The block of a layer, with fresh weights."""
    place = Place(
        config.width,
        causal=causal,
        rotary=config.rotary,
        window=config.window_of(layer),
        window_inclusive=config.window_inclusive,
        value_embedding=config.has_value_embedding(layer),
    )
    feed_forward = FeedForward if config.blocks == "plain" else SquaredReluFeedForward
    return Block(
        build_norm(config, "mixing"),
        build_mixer(config.mixer_of(layer), config, place),
        build_norm(config, "feed_forward"),
        feed_forward(config.width, hidden_width=config.hidden_width, dropout=config.dropout.mlp),
        mixing_dropout=config.dropout.residual,
    )


def build_norm(config: LayersConfig, place: NormPlace) -> nn.Module:
    """A norm of a stack, without weights in the blocks of nanochat."""
    parameters = not (isinstance(config, BlocksConfig) and config.blocks == "nanochat")
    return config.norm.build(config.width, place, parameters=parameters)
