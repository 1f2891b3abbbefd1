"""What the configurations of all stacks have in common."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor, nn

from kmixer.config import Layers, Positive, Probability, StrictConfig, Width
from kmixer.errors import InputError
from kmixer.layers import attach
from kmixer.layers.block import Block
from kmixer.layers.copy_memory import MatchLength, chosen_layers
from kmixer.layers.fast_weights import Init, Target, check_fast_weights
from kmixer.models.heads import HeadConfig
from kmixer.models.norm_config import NormConfig

# What a stack adds to what its layers mix where there is no copy memory.
NOTHING: Mapping[int, Tensor] = MappingProxyType({})


def added_to(layer: int, added: Mapping[int, Tensor]) -> dict[str, Tensor]:
    """What a block is called with: nothing more where nothing is added, as a wrapped block may take no more."""
    return {"added": added[layer]} if layer in added else {}


def adapting_to(block: nn.Module, source: Tensor) -> dict[str, Tensor]:
    """What a block is called with for its fast weights: nothing more where it has none."""
    return {"source": source} if has_fast_weights(block) else {}


def has_fast_weights(block: nn.Module) -> bool:
    """Whether the feed-forward layer of a block has fast weights."""
    return isinstance(block, Block) and block.fast_weights is not None


class DropoutConfig(StrictConfig):
    """Dropout probabilities of the stack."""

    embedding: Probability = 0.0
    mlp: Probability = 0.0  # hidden units of every feed-forward layer
    residual: Probability = 0.0  # mixing branch of the mixing layers


class CopyMemoryConfig(StrictConfig):
    """Tells the mixing layers what followed the last time these tokens were seen; see `kmixer.layers.CopyMemory`."""

    layers: Literal["all", "last", "none"] | list[Annotated[int, Field(ge=0)]] = "all"  # from 0
    memory: Annotated[Positive, Field(multiple_of=2)] | None = None  # tokens remembered; None is all
    match_length: MatchLength = "unused"  # what knows how long the match is
    second: Positive | None = None  # a second memory beside it, of the longest match of at most so many tokens
    pointer: bool = False  # the copied token gets a share of the probability itself


def _null(value: Any) -> Any:
    return "null" if value is None else value


class FastWeightsConfig(StrictConfig):
    """Feed-forward layers that learn from what they read; see `kmixer.layers.FastWeights`."""

    # Numbers from 0; None is the last and the middle one.
    layers: Literal["every"] | list[Annotated[int, Field(ge=0)]] | None = None
    chunk: Positive = 64  # positions that read before they write
    rate: Annotated[float, Field(gt=0)] = 0.02  # of the write of a token
    # Tokens after which 1 / e is left, as training begins; "null" forgets nothing (TOML has no null).
    tau: Annotated[float | Literal["null"], BeforeValidator(_null)] = 600.0
    target: Target = "embed"
    taps: Positive = 5  # of the filter over targets, an odd number
    init: Init = "zero"
    max_norm: Annotated[float, Field(gt=0)] | None = None  # of what is learned, over that of the matrix
    reset_every: Positive | None = None  # tokens

    @model_validator(mode="after")
    def _fits(self) -> Self:
        check_fast_weights(**self.options())
        return self

    def options(self) -> dict[str, Any]:
        """The settings as arguments of `FastWeights`."""
        return {**self.model_dump(exclude={"layers"}), "tau": None if self.tau == "null" else self.tau}

    def chosen(self, count: int) -> tuple[int, ...]:
        """The numbers of the layers that have them, of so many. Raises InputError for one that is not there."""
        return attach.chosen_layers(self.layers, count)


class LayersConfig(StrictConfig):
    """What every stack of mixing layers has."""

    width: Width  # d
    layers: Layers  # number of mixing layers
    norm: NormConfig = NormConfig()
    embedding_scale: Annotated[float, Field(ge=0)] = 0.0  # a learned scale of what enters, which starts here; 0: none
    dropout: DropoutConfig = DropoutConfig()


class StackConfig(LayersConfig):
    """What every language model has around its mixing layers."""

    embedding_width: Width | None = None  # factorised embedding; None is `width`
    head: HeadConfig = HeadConfig()
    copy_memory: CopyMemoryConfig | None = None
    fast_weights: FastWeightsConfig | None = None

    @model_validator(mode="after")
    def _chosen_layers_are_there(self) -> Self:
        if self.copy_memory is not None:
            chosen_layers(self.copy_memory.layers, self.layers)
        if self.fast_weights is not None:
            self.fast_weights.chosen(self.layers)
        return self

    def with_memory(self, memory: int) -> Self:
        """The same, with a copy memory of another size; its weights fit, as none of them depends on it.

        Raises InputError for a size that has no halves, and where there is no copy memory.
        """
        if self.copy_memory is None:
            raise InputError(f"memory: got {memory}; this model has no copy memory, leave it out")
        if memory < 2 or memory % 2:
            raise InputError(f"memory: got {memory}; allowed: an even number of tokens from 2 on")
        return self.model_copy(update={"copy_memory": self.copy_memory.model_copy(update={"memory": memory})})

    @property
    def max_positions(self) -> int | None:
        """Positions a sequence may have; None where the model streams for ever."""
        return None

    @property
    def limited_by(self) -> str:
        """What ends at `max_positions`."""
        return ""

    @property
    def state_grows(self) -> bool:
        """Whether a stream needs ever more memory and time a position."""
        return self.copy_memory is not None and self.copy_memory.memory is None
