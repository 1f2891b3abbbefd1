"""A pre-norm decoder-only transformer: the softmax baseline, with the calling convention of `CausalLM`.

tokens (b, t) -> embedding -> [x + attention(RMSNorm(x)), x + feed_forward(RMSNorm(x))] x layers
-> RMSNorm -> logits with the embedding table (b, t, v). Positions enter by rotation of queries and keys only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from kmixer.config import StrictConfig
from kmixer.errors import InputError
from kmixer.layers.feed_forward import INITIAL_STD, FeedForward, RMSNorm
from kmixer.layers.softmax_attention import KeyValueCache, SoftmaxAttention, check_heads
from kmixer.models.causal_lm import CausalLM, Output
from kmixer.models.config import ModelConfig, Positive, Probability
from kmixer.models.heads import cross_entropies

TransformerState = tuple[KeyValueCache, ...]

# Hidden widths are multiples of this, so that rows fill whole vectors of 8 float32.
HIDDEN_MULTIPLE = 8
# Head width of `transformer_like`, where the width allows it.
HEAD_WIDTH = 32


class TransformerConfig(StrictConfig):
    """Everything that determines a transformer's function but the weights and the vocabulary."""

    width: Positive  # d
    layers: Positive
    heads: Positive  # h; d / h is even
    mlp_multiplier: Annotated[float, Field(gt=0)] = 4.0  # hidden width over d, before rounding
    dropout: Probability = 0.0  # on the embedding, attention weights and hidden units

    @model_validator(mode="after")
    def _fits(self) -> TransformerConfig:
        check_heads(self.width, self.heads)
        return self

    @property
    def hidden_width(self) -> int:
        """Hidden units of a feed-forward layer, a multiple of 8."""
        return HIDDEN_MULTIPLE * max(1, round(self.mlp_multiplier * self.width / HIDDEN_MULTIPLE))


class Block(nn.Module):
    """x + attention(RMSNorm(x)), then x + feed_forward(RMSNorm(x))."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width)
        self.attention = SoftmaxAttention(config.width, config.heads, dropout=config.dropout)
        self.feed_forward_norm = RMSNorm(config.width)
        self.feed_forward = FeedForward(config.width, hidden_width=config.hidden_width, dropout=config.dropout)

    def forward(
        self, x: Float[Tensor, "b t d"], state: KeyValueCache | None = None
    ) -> tuple[Float[Tensor, "b t d"], KeyValueCache]:
        attended, state = self.attention(self.attention_norm(x), state)
        x = x + attended
        return self.feed_forward(x, self.feed_forward_norm), state


class Transformer(nn.Module):
    """Next-token model with softmax attention. Its state grows with every token, its cost a token too.

    Args:
        config: the model's configuration.
        vocabulary_size: v.
    """

    def __init__(self, config: TransformerConfig, vocabulary_size: int) -> None:
        super().__init__()
        self.config = config
        self.vocabulary_size = vocabulary_size
        self.embedding = nn.Embedding(vocabulary_size, config.width)
        nn.init.normal_(self.embedding.weight, std=INITIAL_STD)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width)

    def initial_state(self, batch_size: int) -> TransformerState:
        """The state before the first token of `batch_size` sequences."""
        return tuple(block.attention.initial_state(batch_size) for block in self._blocks())

    def forward(
        self,
        tokens: Int[Tensor, "b t"],
        state: TransformerState | None = None,
        targets: Int[Tensor, "b t"] | None = None,
    ) -> Output:
        """Logits of the next token at every position, and the state after the last.

        `model(tokens)` equals `model(tokens[:, :k])` followed by `model(tokens[:, k:], state)` for
        every k. With `targets`, the cross-entropy of each target takes the place of the logits.
        """
        if tokens.ndim != 2:
            raise InputError(f"tokens: got shape {tuple(tokens.shape)}; allowed: (batch, time)")
        x = F.dropout(self.embedding(tokens), self.config.dropout, self.training)
        caches = []
        for index, block in enumerate(self._blocks()):
            x, cache = block(x, state[index] if state else None)
            caches.append(cache)
        logits = F.linear(self.norm(x), self.embedding.weight)
        if targets is None:
            return Output(tuple(caches), logits=logits)
        return Output(tuple(caches), losses=cross_entropies(logits, targets))

    def _blocks(self) -> Iterator[Block]:
        for block in self.blocks:
            assert isinstance(block, Block)
            yield block


def transformer_like(config: ModelConfig, vocabulary_size: int) -> TransformerConfig:
    """The transformer to compare a K-Operators model with.

    Matched: the width, the depth in mixing layers (K2 layers against attention layers; the two K1
    layers and K0 have no counterpart), and the number of parameters, all of them counted, by the
    hidden width of the feed-forward layers: the multiple of 8 that comes closest, 8 at least.
    Not matched: FLOPs, the size of the state, dropout (0 here), the head, which is tied.
    The head width is 32, or the even divisor of the width that is closest to it.

    Raises InputError for an odd width, which no even head width divides.
    """
    width = config.width
    if width % 2:
        raise InputError(f"width: got {width}; a transformer with rotary positions needs an even one")
    head_width = min((e for e in range(2, width + 1, 2) if width % e == 0), key=lambda e: abs(e - HEAD_WIDTH))

    def with_hidden(hidden: int) -> TransformerConfig:
        heads, multiplier = width // head_width, hidden / width
        return TransformerConfig(width=width, layers=config.layers, heads=heads, mlp_multiplier=multiplier)

    with torch.device("meta"):
        target = _size(CausalLM(config, vocabulary_size))
        smallest, second = (
            _size(Transformer(with_hidden(steps * HIDDEN_MULTIPLE), vocabulary_size)) for steps in (1, 2)
        )
    steps = 1 + max(0, round((target - smallest) / (second - smallest)))
    return with_hidden(steps * HIDDEN_MULTIPLE)


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
