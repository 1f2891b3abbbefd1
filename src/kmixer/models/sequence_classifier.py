"""A classifier of token sequences around any mixer.

    embedding + learned positions -> blocks -> norm -> mean over the positions that are not padding -> classes

All mixers see the past only, K2 among them, so that they are compared on equal terms and padding, which stands
at the end, is seen by no position that counts: a padded row gives what it gives alone.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kmixer.errors import InputError
from kmixer.layers.feed_forward import INITIAL_STD, linear
from kmixer.models.config import SequenceClassifierConfig
from kmixer.models.flops import linear_flops, mixing_flops
from kmixer.models.transformer import Transformer, build_norm
from kmixer.ops.fused import dropout

PADDING = 0


class SequenceClassifier(nn.Module):
    """Tokens (b, t), padded with 0 at the end, to logits of the classes (b, k).

    Raises InputError for sequences longer than the positions, or of padding alone.
    """

    def __init__(self, config: SequenceClassifierConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        nn.init.normal_(self.embedding.weight, std=INITIAL_STD)
        self.positions = nn.Parameter(INITIAL_STD * torch.randn(config.length, config.width))
        self.stack = Transformer(config)
        self.norm = build_norm(config)
        self.head = linear(config.width, config.classes)

    def forward(self, tokens: Int[Tensor, "b t"]) -> Float[Tensor, "b k"]:
        t = tokens.shape[1]
        if t > self.config.length:
            raise InputError(f"tokens: got {t} positions; this model has {self.config.length}")
        counts = tokens != PADDING
        lengths = counts.sum(1)
        if bool((lengths == 0).any()):
            raise InputError("tokens: a row holds padding alone")
        x = self.embedding(tokens) + self.positions[:t]
        if self.training:
            x = dropout(x, self.config.dropout.embedding)
        x = self.norm(self.stack(x)[0])
        if self.config.pooling == "last":
            pooled = x[torch.arange(len(x), device=x.device), lengths - 1]
        else:
            pooled = (x * counts.unsqueeze(-1)).sum(1) / lengths.unsqueeze(-1)
        logits: Tensor = self.head(pooled)
        return logits

    def compile_layers(self, backend: str = "inductor") -> None:
        """Let torch.compile translate each kind of block once."""
        self.stack.compile_layers(backend)


def count_sequence_flops(model: SequenceClassifier, length: int) -> float:
    """Operations of the forward pass of one sequence; see `count_flops`."""
    return length * (linear_flops(model.stack) + mixing_flops(model.stack, length)) + linear_flops(model.head)
