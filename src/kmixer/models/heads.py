"""Heads: from hidden vectors to logits, and to the cross-entropy of given targets.

Every head has `forward(hidden, embedding)` -> logits (b, t, v), or (b, v) for hidden vectors (b, d), and
`losses(hidden, targets, embedding)` -> cross-entropies in nats (b, t); `embedding` (v, e) is the model's
embedding table, used where it is tied.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from kmixer.config import Multiplier, Positive, Probability, StrictConfig
from kmixer.errors import InputError
from kmixer.layers.exactly import exactly
from kmixer.layers.linear import INITIAL_STD, Linear, linear
from kmixer.layers.roles import TABLE, Role
from kmixer.models.norm_config import NormConfig
from kmixer.ops.cross_entropy import cross_entropies, soft_capped
from kmixer.ops.fused import linear_gelu_dropout
from kmixer.ops.linear import linear_map

ADAPTIVE_DIVISOR = 4.0


class HeadConfig(StrictConfig):
    """From hidden vectors to the vocabulary; see `kmixer.models.heads`."""

    kind: Literal["linear", "untied", "gelu", "adaptive"] = "linear"  # linear: tied to the embedding
    multiplier: Multiplier | None = None  # gelu: hidden width over d
    cutoffs: list[Positive] | None = None  # adaptive: ends of the frequency bands; None takes Koneko's rule
    dropout: Probability = 0.0  # gelu: on the hidden units; adaptive: on the input
    soft_cap: Annotated[float, Field(gt=0)] | None = None  # linear, untied: logits become cap tanh(logits / cap)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (self.kind == "gelu") != (self.multiplier is not None):
            raise ValueError(
                f"kind {self.kind!r} with multiplier {self.multiplier}; it goes with kind 'gelu' and only with it"
            )
        if self.cutoffs is not None and self.kind != "adaptive":
            raise ValueError(f"kind {self.kind!r} with cutoffs; cutoffs go with kind 'adaptive' only")
        if self.cutoffs is not None and self.cutoffs != sorted(set(self.cutoffs)):
            raise ValueError(f"cutoffs: got {self.cutoffs}; they must increase")
        plain = self.kind in ("linear", "untied")
        if self.dropout and plain:
            raise ValueError(f"dropout goes with kind 'gelu' or 'adaptive'; {self.kind!r} has none")
        if self.soft_cap is not None and not plain:
            raise ValueError(f"kind {self.kind!r} with soft_cap; it goes with kind 'linear' or 'untied'")
        return self


class LinearHead(nn.Module):
    """logits = E h with the embedding table E, after a bias-free map d -> e where they differ.

    With a soft cap c, c tanh(logits / c).
    """

    def __init__(self, width: int, embedding_width: int, soft_cap: float | None = None) -> None:
        super().__init__()
        factorised = embedding_width != width
        self.to_embedding = linear(width, embedding_width, bias=False) if factorised else nn.Identity()
        self.soft_cap = soft_cap

    def roles(self) -> dict[str, Role]:
        return {name: TABLE for name, _ in self.named_parameters()}

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        return soft_capped(linear_map(self.to_embedding(hidden), embedding), self.soft_cap)

    def losses(self, hidden: Tensor, targets: Tensor, embedding: Tensor) -> Tensor:
        return cross_entropies(linear_map(self.to_embedding(hidden), embedding), targets, self.soft_cap)


class UntiedHead(nn.Module):
    """logits = W h with a matrix of its own, and a soft cap as `LinearHead` has it."""

    def __init__(self, width: int, vocabulary_size: int, soft_cap: float | None = None) -> None:
        super().__init__()
        self.to_logits = linear(width, vocabulary_size, bias=False)
        self.soft_cap = soft_cap

    def roles(self) -> dict[str, Role]:
        return {"to_logits.weight": TABLE}

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        return soft_capped(self.to_logits(hidden), self.soft_cap)

    def losses(self, hidden: Tensor, targets: Tensor, embedding: Tensor) -> Tensor:
        return cross_entropies(self.to_logits(hidden), targets, self.soft_cap)


class GeluHead(nn.Module):
    """norm -> Linear(d, m d) -> GELU -> dropout -> Linear(m d, v) without bias."""

    def __init__(self, width: int, vocabulary_size: int, config: HeadConfig, norm: NormConfig) -> None:
        super().__init__()
        assert config.multiplier is not None
        hidden = config.multiplier * width
        self.norm = norm.build(width, "final")
        self.up = linear(width, hidden)
        self.down = linear(hidden, vocabulary_size, bias=False)
        self.dropout = config.dropout

    def roles(self) -> dict[str, Role]:
        return {"up.weight": TABLE, "down.weight": TABLE}

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        x, up = self.norm(hidden), self.up
        if exactly(up, Linear) and up.bias is not None:
            return self.down(linear_gelu_dropout(x, up.weight, up.bias, self.dropout if self.training else 0.0))
        return self.down(F.dropout(F.gelu(up(x)), self.dropout, self.training))

    def losses(self, hidden: Tensor, targets: Tensor, embedding: Tensor) -> Tensor:
        return cross_entropies(self(hidden, embedding), targets)


class AdaptiveHead(nn.Module):
    """Adaptive softmax (Grave et al. 2017): frequent tokens in the first band, rare ones in narrower bands.

    `order` (v,) is the rank of each token by descending frequency in the training data; it is part
    of the model's function and saved with it. Until `set_frequencies` it is the identity.
    """

    order: Tensor

    def __init__(self, width: int, vocabulary_size: int, config: HeadConfig) -> None:
        super().__init__()
        cutoffs = config.cutoffs or default_cutoffs(vocabulary_size)
        if cutoffs[-1] >= vocabulary_size:
            raise InputError(f"model.head.cutoffs: got {cutoffs}; all must be below the vocabulary's {vocabulary_size}")
        narrowest = int(ADAPTIVE_DIVISOR) ** len(cutoffs)
        if width < narrowest:
            raise InputError(f"model.width: got {width}; {len(cutoffs)} adaptive cutoffs need {narrowest}")
        self.softmax = nn.AdaptiveLogSoftmaxWithLoss(width, vocabulary_size, cutoffs, ADAPTIVE_DIVISOR)
        for module in self.softmax.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=INITIAL_STD)
        self.dropout = config.dropout
        self.register_buffer("order", torch.arange(vocabulary_size))

    def roles(self) -> dict[str, Role]:
        return {name: TABLE for name, _ in self.named_parameters()}

    def set_frequencies(self, counts: Tensor) -> None:
        """Order the vocabulary by counts (v,) in the training data; ties go to the lower token."""
        by_frequency = torch.argsort(counts, descending=True, stable=True)
        self.order[by_frequency] = torch.arange(len(counts), device=self.order.device)

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            flat = self.softmax.log_prob(self._input(hidden))
        return flat[:, self.order].unflatten(0, hidden.shape[:-1])

    def losses(self, hidden: Tensor, targets: Tensor, embedding: Tensor) -> Tensor:
        # torch's module mixes dtypes under autocast; its bands are small beside the stack.
        with torch.autocast(hidden.device.type, enabled=False):
            result = self.softmax(self._input(hidden), self.order[targets].flatten())
        return -result.output.view(targets.shape)

    def _input(self, hidden: Tensor) -> Tensor:
        dropped = F.dropout(hidden, self.dropout, self.training)
        return dropped.flatten(0, -2).to(self.softmax.head.weight.dtype)


Head = LinearHead | UntiedHead | GeluHead | AdaptiveHead


def build_head(
    config: HeadConfig, width: int, embedding_width: int, vocabulary_size: int, norm: NormConfig | None = None
) -> Head:
    """The head that a model configuration asks for, from hidden vectors of a width to a vocabulary.

    `norm` is what the model's norms are; one inside the head is of that kind.
    """
    if config.kind == "linear":
        return LinearHead(width, embedding_width, config.soft_cap)
    if config.kind == "untied":
        return UntiedHead(width, vocabulary_size, config.soft_cap)
    if config.kind == "gelu":
        return GeluHead(width, vocabulary_size, config, norm or NormConfig())
    return AdaptiveHead(width, vocabulary_size, config)


def default_cutoffs(vocabulary_size: int) -> list[int]:
    """Koneko's rule for the frequency bands of the adaptive head."""
    v = vocabulary_size
    if v < 1024:
        raise InputError(f"model.head.kind: 'adaptive' needs a vocabulary of 1024 or more and this one has {v}")
    if v <= 4096:
        return [max(256, v // 4), max(768, 3 * v // 4)]
    if v <= 16384:
        return [2000, max(4000, v // 2)]
    return [2000, 10000, max(20000, 3 * v // 4)]
