"""The transformer: blocks of a mixer and a feed-forward layer, for softmax attention or any other mixer.

    x = x + mixer(norm(x)), then x = x + feed_forward(norm(x)), in every block

Positions enter by rotation inside attention only; K2 needs none. See `BlocksConfig` for the two kinds
of blocks, the windows and the value embeddings.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kmixer.errors import InputError
from kmixer.layers import FeedForward, SquaredReluFeedForward
from kmixer.layers.block import Block, BlockState
from kmixer.layers.linear import INITIAL_STD
from kmixer.layers.norms import RMSNorm, UnweightedRMSNorm
from kmixer.models.config import BlocksConfig, LayersConfig
from kmixer.models.mixers.registry import Place, build_mixer

# One state a block.
TransformerState = tuple[BlockState, ...]


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
        return tuple(block.initial_state(batch_size) for block in self.blocks)  # type: ignore[operator]

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
        for layer, block in enumerate(self.blocks):
            if self.stream_scale is not None and self.input_scale is not None:
                x = self.stream_scale[layer] * x + self.input_scale[layer] * first
            key = str(layer)
            extra = (self.value_embeddings[key](tokens),) if key in self.value_embeddings else ()
            x, block_state = block(x, state[layer] if state else None, *extra)
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
        build_norm(config),
        build_mixer(config.mixer_of(layer), config, place),
        build_norm(config),
        feed_forward(config.width, hidden_width=config.hidden_width, dropout=config.dropout.mlp),
        mixing_dropout=config.dropout.residual,
    )


def build_norm(config: LayersConfig) -> RMSNorm | UnweightedRMSNorm:
    """RMSNorm, without weights in the blocks of nanochat."""
    if isinstance(config, BlocksConfig) and config.blocks == "nanochat":
        return UnweightedRMSNorm()
    return RMSNorm(config.width)
