"""A classifier of token sequences around any mixer.

    embedding + learned positions -> blocks -> norm -> read-out -> classes

The read-out is the mean over the positions that are not padding, or a class token that stands after the last of them.
Padding stands at the end. Where the mixers see the past only, no position that counts sees it, so that training takes
a padded batch as it is.
"""

from __future__ import annotations

from typing import Literal, Self

import torch
from jaxtyping import Float, Int
from pydantic import model_validator
from torch import Tensor, nn

from kmixer.config import Vocabulary
from kmixer.errors import InputError
from kmixer.layers.linear import INITIAL_STD, linear
from kmixer.layers.roles import LOGIT, TABLE, VECTOR, Role
from kmixer.models.flops import operations
from kmixer.models.mixers.choice import both_ways
from kmixer.models.mixers.cost import linear_operations
from kmixer.models.transformer import BlocksConfig, Transformer, build_norm
from kmixer.ops.fused import dropout

PADDING = 0


class SequenceClassifierConfig(BlocksConfig):
    """Blocks between an embedding with learned positions and a linear map to classes."""

    kind: Literal["sequence-classifier"] = "sequence-classifier"
    vocabulary: Vocabulary  # v, with 0 for padding
    length: Vocabulary  # positions that are learned
    classes: Vocabulary
    rotary: bool = False
    causal: bool = True  # positions see those before them only, or all
    # What is read out: the mean over the positions that are not padding, or a class token after the last of them.
    pooling: Literal["mean", "class"] = "mean"

    @model_validator(mode="after")
    def _classifies(self) -> Self:
        if self.value_embeddings:
            raise ValueError("value_embeddings: language models only")
        if not self.causal and self.causal_mixer is not None:
            raise ValueError(
                f"causal: {self.causal_mixer} mixes with the past only; allowed with causal = false: {both_ways()}"
            )
        if self.causal and self.refuses_causal is not None:
            raise ValueError(f"causal: {self.refuses_causal}; allowed: causal = false")
        if not self.causal and self.window is not None:
            raise ValueError("window: goes with causal = true")
        return self


def lengths_of(tokens: Int[Tensor, "b t"]) -> Int[Tensor, " b"]:
    """How many positions of each row are not padding."""
    return (tokens != PADDING).sum(1)


class SequenceClassifier(nn.Module):
    """Tokens (b, t), padded with 0 at the end, to logits of the classes (b, k).

    In evaluation the rows of a padded batch are computed one by one, each at its own length: nothing is spent on
    padding, and a sequence gets the answer that it gets alone, to the bit. A batch in which all rows fill all positions
    is computed at once, and agrees with its rows alone to rounding. In training rows go one by one where positions see
    all others, because the mixers know no padding.

    Raises InputError for sequences longer than the positions, or of padding alone.
    """

    def __init__(self, config: SequenceClassifierConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        nn.init.normal_(self.embedding.weight, std=INITIAL_STD)
        self.positions = nn.Parameter(INITIAL_STD * torch.randn(config.length, config.width))
        scale = config.embedding_scale
        self.embedding_scale = nn.Parameter(torch.tensor(scale)) if scale else None
        with_token = config.pooling == "class"
        self.class_token = nn.Parameter(INITIAL_STD * torch.randn(config.width)) if with_token else None
        self.stack = Transformer(config, causal=config.causal)
        self.norm = build_norm(config, "final")
        self.head = linear(config.width, config.classes)

    def roles(self) -> dict[str, Role]:
        token = {} if self.class_token is None else {"class_token": VECTOR}
        scale = {} if self.embedding_scale is None else {"embedding_scale": LOGIT}
        return {"positions": TABLE, "head.weight": TABLE, **token, **scale}

    def forward(self, tokens: Int[Tensor, "b t"]) -> Float[Tensor, "b k"]:
        lengths = self._checked_lengths(tokens)
        padded = bool((lengths < tokens.shape[1]).any())
        if padded and not (self.training and self.config.causal):
            rows = zip(tokens, lengths.tolist(), strict=True)
            return torch.cat([self._classify(row[None, :n], lengths.new_tensor([n])) for row, n in rows])
        return self._classify(tokens, lengths)

    def classify_together(self, tokens: Int[Tensor, "b t"]) -> Float[Tensor, "b k"]:
        """A padded batch at once, which agrees with its rows alone to rounding; rows go alone where causal is false."""
        return self._classify(tokens, self._checked_lengths(tokens)) if self.config.causal else self(tokens)

    def _checked_lengths(self, tokens: Tensor) -> Tensor:
        if tokens.shape[1] > self.config.length:
            raise InputError(f"tokens: got {tokens.shape[1]} positions; this model has {self.config.length}")
        lengths = lengths_of(tokens)
        if bool((lengths == 0).any()):
            raise InputError("tokens: a row holds padding alone")
        return lengths

    def _classify(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        t = tokens.shape[1]
        x = self.embedding(tokens) + self.positions[:t]
        positions = torch.arange(t + 1, device=x.device)
        if self.class_token is not None:
            after = (positions == lengths[:, None]).unsqueeze(-1)  # (b, t + 1, 1)
            x = torch.where(after, self.class_token.to(x.dtype), torch.cat([x, x[:, :1]], dim=1))
        if self.embedding_scale is not None:  # of the class token and the positions too
            x = self.embedding_scale * x
        if self.training:
            x = dropout(x, self.config.dropout.embedding)
        x = self.norm(self.stack(x)[0])
        if self.class_token is not None:
            pooled = x[torch.arange(len(x), device=x.device), lengths]
        else:
            counts = (positions[:t] < lengths[:, None]).unsqueeze(-1)
            pooled = (x * counts).sum(1) / lengths.unsqueeze(-1)
        logits: Tensor = self.head(pooled)
        return logits

    def compile_layers(self, backend: str = "inductor") -> None:
        """Let torch.compile translate each kind of block once."""
        self.stack.compile_layers(backend)


def count_sequence_flops(model: SequenceClassifier, length: int, *, every_key: bool = False) -> float:
    """Operations of the forward pass of one sequence; see `count_flops`."""
    length += model.class_token is not None
    return length * operations(model.stack, length, every_key=every_key) + linear_operations(model.head)
