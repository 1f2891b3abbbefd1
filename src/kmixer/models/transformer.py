"""The transformer: blocks of a mixer and a feed-forward layer, for softmax attention or any other mixer.

    x = x + mixer(norm(x)), then x = x + feed_forward(norm(x)), in every block

Positions enter by rotation inside attention only; K2 needs none. See `BlocksConfig` for the two kinds
of blocks, the windows and the value embeddings.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from kmixer.errors import InputError
from kmixer.layers import FeedForward, SquaredReluFeedForward
from kmixer.layers.feed_forward import INITIAL_STD, RMSNorm, UnweightedRMSNorm
from kmixer.models.config import BlocksConfig, LayersConfig
from kmixer.models.mixers.registry import Place, build_mixer

# One state a layer: what its mixer carries.
TransformerState = tuple[Any, ...]


class Block(nn.Module):
    """x + mixer(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: BlocksConfig, layer: int, *, causal: bool = True) -> None:
        super().__init__()
        place = Place(
            config.width,
            causal=causal,
            rotary=config.rotary,
            window=config.window_of(layer),
            window_inclusive=config.window_inclusive,
            value_embedding=config.has_value_embedding(layer),
        )
        self.mixing_norm = build_norm(config)
        self.mixer: Any = build_mixer(config.mixer_of(layer), config, place)
        self.mixing_dropout = config.dropout.residual
        self.feed_forward_norm = build_norm(config)
        feed_forward = FeedForward if config.blocks == "plain" else SquaredReluFeedForward
        self.feed_forward = feed_forward(config.width, hidden_width=config.hidden_width, dropout=config.dropout.mlp)

    def forward(
        self, x: Float[Tensor, "b t d"], state: Any = None, value_embedding: Float[Tensor, "b t d"] | None = None
    ) -> tuple[Float[Tensor, "b t d"], Any]:
        extra = () if value_embedding is None else (value_embedding,)
        mixed, state = self.mixer(self.mixing_norm(x), state, *extra)
        x = x + F.dropout(mixed, self.mixing_dropout, self.training)
        return self.feed_forward(x, self.feed_forward_norm), state


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
        self.blocks = nn.ModuleList(Block(config, layer, causal=causal) for layer in layers)
        # nanochat: block i takes stream_scale_i x + input_scale_i x_0.
        scaled = config.blocks == "nanochat"
        self.input_norm = build_norm(config) if scaled else nn.Identity()
        self.stream_scale = nn.Parameter(torch.ones(config.layers)) if scaled else None
        self.input_scale = nn.Parameter(torch.zeros(config.layers)) if scaled else None
        with_tables = [layer for layer in layers if config.has_value_embedding(layer)]
        self.value_embeddings = nn.ModuleDict(
            {str(layer): nn.Embedding(vocabulary_size, config.width) for layer in with_tables}
        )
        for table in self.value_embeddings.values():
            assert isinstance(table, nn.Embedding)
            nn.init.normal_(table.weight, std=INITIAL_STD)

    def compile_layers(self, backend: str = "inductor") -> None:
        """Let torch.compile translate each kind of block once, for every block of it, batch size and length."""
        for block in self.blocks:
            block.compile(dynamic=True, fullgraph=True, backend=backend)

    def initial_state(self, batch_size: int) -> TransformerState:
        """The state before the first position of `batch_size` sequences."""
        return tuple(block.mixer.initial_state(batch_size) for block in self._blocks())

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        state: TransformerState | None = None,
        tokens: Int[Tensor, "b t"] | None = None,
    ) -> tuple[Float[Tensor, "b t d"], TransformerState]:
        """All blocks. `tokens` are those of x; only value embeddings read them."""
        if self.value_embeddings and tokens is None:
            raise InputError("tokens: missing; this stack has value embeddings, which need them")
        x = first = self.input_norm(x)
        states = []
        for layer, block in enumerate(self._blocks()):
            if self.stream_scale is not None and self.input_scale is not None:
                x = self.stream_scale[layer] * x + self.input_scale[layer] * first
            key = str(layer)
            value_embedding = self.value_embeddings[key](tokens) if key in self.value_embeddings else None
            x, block_state = block(x, state[layer] if state else None, value_embedding)
            states.append(block_state)
        return x, tuple(states)

    def _blocks(self) -> Iterator[Block]:
        for block in self.blocks:
            assert isinstance(block, Block)
            yield block


def build_norm(config: LayersConfig) -> RMSNorm | UnweightedRMSNorm:
    """RMSNorm, without weights in the blocks of nanochat."""
    if isinstance(config, BlocksConfig) and config.blocks == "nanochat":
        return UnweightedRMSNorm()
    return RMSNorm(config.width)
