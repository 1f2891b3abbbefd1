"""Configurations of language models: everything that determines their function but weights and vocabulary.

`ModelConfig` is a K-Stack, `TransformerConfig` a stack of blocks with any mixer; `kind` tells them apart.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from kmixer.config import Layers, Multiplier, Positive, StrictConfig, Taps, Vocabulary, Width
from kmixer.layers.base_kernel import Init
from kmixer.layers.gaussian_attention import ValueSource
from kmixer.layers.hierarchical_attention import Downsampling, Fusion
from kmixer.layers.k_operators import DecayInit
from kmixer.layers.rotary import check_heads
from kmixer.ops.attention.gaussian import Backend as GaussianBackend
from kmixer.ops.decay.recurrence import Backend

Probability = Annotated[float, Field(ge=0, lt=1)]


class BaseKernelConfig(StrictConfig):
    """The causal base kernel of the K2 layers; see `kmixer.layers.BaseKernel`."""

    kind: Literal["none", "dense", "low_rank", "toeplitz", "conv"] = "conv"
    size: Taps = 8  # positions (dense, low_rank) or lags (toeplitz, conv)
    rank: Width | None = None  # of low_rank
    shared: bool = True  # one for the whole stack, or one a layer
    init: Init = "exponential"
    gate_init: float = 0.0  # initial logit of each layer's gate

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (self.kind == "low_rank") != (self.rank is not None):
            raise ValueError(
                f"kind {self.kind!r} with rank {self.rank}; rank goes with kind 'low_rank' and only with it"
            )
        if self.rank is not None and self.rank > self.size:
            raise ValueError(f"rank {self.rank} is more than size {self.size}")
        return self


class DecayConfig(StrictConfig):
    """The decayed recurrence of the K2 layers; see `kmixer.layers.K2`."""

    range: Annotated[tuple[float, float], Field(strict=False)] = (0.05, 0.999)
    init: DecayInit = "time_constant"
    alpha: Literal["per_channel", "per_layer"] = "per_channel"
    alpha_cap: Annotated[float, Field(gt=0)] = 1.0
    backend: Backend = "auto"

    @model_validator(mode="after")
    def _fits(self) -> Self:
        low, high = self.range
        if not 0.01 <= low < high <= 1:
            raise ValueError(f"range: got [{low}, {high}]; allowed: 0.01 <= low < high <= 1")
        return self


class RefinementConfig(StrictConfig):
    """The equilibrium loop h <- h + eta (KStack(h) - h)."""

    steps: Annotated[int, Field(ge=0, le=1 << 10)] = 1  # 0 is one plain pass; eta stays a parameter, unused
    initial_eta: Annotated[float, Field(gt=0, lt=1)] = 0.3


class HeadConfig(StrictConfig):
    """From hidden vectors to the vocabulary; see `kmixer.models.heads`."""

    kind: Literal["linear", "untied", "gelu", "adaptive"] = "linear"  # linear: tied to the embedding
    multiplier: Multiplier | None = None  # gelu: hidden width over d
    cutoffs: list[Positive] | None = None  # adaptive: ends of the frequency bands; None takes the author's rule
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


class DropoutConfig(StrictConfig):
    """Dropout probabilities of the stack."""

    embedding: Probability = 0.0
    mlp: Probability = 0.0  # hidden units of every feed-forward layer
    residual: Probability = 0.0  # mixing branch of the mixing layers


class LayersConfig(StrictConfig):
    """What every stack of mixing layers has."""

    width: Width  # d
    layers: Layers  # number of mixing layers
    dropout: DropoutConfig = DropoutConfig()


class StackConfig(LayersConfig):
    """What every language model has around its mixing layers."""

    embedding_width: Width | None = None  # factorised embedding; None is `width`
    head: HeadConfig = HeadConfig()

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
        return False


class ModelConfig(StackConfig):
    """K1 -> K2 x layers -> K1 -> K0 between an embedding and a head."""

    kind: Literal["k-stack"] = "k-stack"
    rank: Width  # r
    base_kernel: BaseKernelConfig = BaseKernelConfig()
    decay: DecayConfig = DecayConfig()
    refinement: RefinementConfig | None = None  # None has no eta
    output_gate: bool = False  # a gate on what every K2 mixes, by SiLU of a linear map
    copy_gate: bool = False  # hold the unused gate of the author's copy branch in every K2

    @property
    def max_positions(self) -> int | None:
        return self.base_kernel.size if self.base_kernel.kind in ("dense", "low_rank") else None

    @property
    def limited_by(self) -> str:
        return f"the {self.base_kernel.kind} base kernel"


class SoftmaxConfig(StrictConfig):
    """Softmax attention; see `kmixer.layers.SoftmaxAttention`."""

    query_key_norm: bool = False
    tie_query_key: bool = False
    value_projection: bool = True
    convolution: Taps | None = None  # taps of a causal convolution before queries and keys


class GaussianConfig(StrictConfig):
    """Gaussian kernel attention; see `kmixer.layers.GaussianAttention`."""

    value_source: ValueSource = "kernel"
    initial_sigma: Annotated[float, Field(gt=0)] | None = None  # None is the square root of the head width
    head_norm: bool | None = None  # None: where positions rotate, that is in language
    exclude_self: bool = False
    backend: GaussianBackend = "auto"


class K2Config(StrictConfig):
    """The mixing of a K2 layer, each layer with its own base kernel; see `kmixer.layers.K2Mixer`."""

    rank: Width = 4
    base_kernel: BaseKernelConfig = BaseKernelConfig(shared=False)
    decay: DecayConfig = DecayConfig()
    output_gate: bool = False

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.base_kernel.shared or self.base_kernel.kind in ("dense", "low_rank"):
            raise ValueError(
                f"base_kernel: got kind {self.base_kernel.kind!r}, shared {self.base_kernel.shared}; "
                "allowed here: none, toeplitz, conv with shared = false (a k-stack takes all)"
            )
        return self


class HierarchicalConfig(StrictConfig):
    """Hierarchical attention; see `kmixer.layers.HierarchicalAttention`."""

    levels: Annotated[int, Field(ge=1, le=31)] = 3  # each halves the positions
    taps: Taps = 4
    downsampling: Downsampling = "depthwise"
    fusion: Fusion = "score"
    fixed_weights: Annotated[tuple[float, ...], Field(strict=False)] | None = None  # of the levels; None trains them
    convolution_head: bool = False


MixerName = Literal["gaussian", "hierarchical", "k2", "softmax"]
WINDOWLESS = ("hierarchical", "k2")


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


# One name is short for a list of it.
MixerNames = Annotated[tuple[MixerName, ...], Field(min_length=1, strict=False), BeforeValidator(_as_list)]


class MixersConfig(StrictConfig):
    """Which mixer each layer has, and the settings of each."""

    mixers: MixerNames = ("softmax",)  # of the layers in turn, repeated
    heads: Width = 1  # h of every mixer but k2
    softmax: SoftmaxConfig = SoftmaxConfig()
    gaussian: GaussianConfig = GaussianConfig()
    hierarchical: HierarchicalConfig = HierarchicalConfig()
    k2: K2Config = K2Config()

    def mixer_of(self, layer: int) -> MixerName:
        """The mixer of layer 0, 1, ..."""
        return self.mixers[layer % len(self.mixers)]


class BlocksConfig(MixersConfig, LayersConfig):
    """Blocks of a mixer and a feed-forward layer.

    Blocks "plain": RMSNorm with weights, GELU feed-forward with biases. Blocks "nanochat": RMSNorm
    without weights (of the embedding too), relu^2 feed-forward without biases, and two scalars a layer
    that weigh the stream and the embedding it began with.
    """

    blocks: Literal["plain", "nanochat"] = "plain"
    mlp_multiplier: Annotated[float, Field(gt=0, le=1024)] = (
        4.0  # hidden width over d, before rounding to a multiple of 8
    )
    rotary: bool = True  # positions rotate the keys of attention
    windows: Annotated[str, Field(pattern="^[SL]+$")] = "L"  # of the layers in turn, repeated: short, or the whole past
    window: Positive | None = None  # positions that a short layer sees
    window_inclusive: bool = False  # not counting the position itself
    value_embeddings: bool = False  # every second softmax layer, the last included, adds one a token to its values

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if set(self.mixers) != {"k2"}:
            check_heads(self.width, self.heads, rotary=self.rotary)
        if ("S" in self.windows) != (self.window is not None):
            raise ValueError(f"windows {self.windows!r} with window {self.window}; S layers need one, and only they do")
        for layer in range(self.layers):
            if self.mixer_of(layer) in WINDOWLESS and self.window_of(layer) is not None:
                raise ValueError(f"windows: layer {layer} is short, and its mixer {self.mixer_of(layer)} has no window")
        return self

    def window_of(self, layer: int) -> int | None:
        """How many positions layer 0, 1, ... sees; None is the whole past."""
        return self.window if self.windows[layer % len(self.windows)] == "S" else None

    def has_value_embedding(self, layer: int) -> bool:
        """Whether layer 0, 1, ... adds value embeddings."""
        second = layer % 2 == (self.layers - 1) % 2
        return self.value_embeddings and second and self.mixer_of(layer) == "softmax"

    @property
    def hidden_width(self) -> int:
        """Hidden units of a feed-forward layer."""
        return HIDDEN_MULTIPLE * max(1, round(self.mlp_multiplier * self.width / HIDDEN_MULTIPLE))


class TransformerConfig(BlocksConfig, StackConfig):
    """Blocks between an embedding and a head: a language model."""

    kind: Literal["transformer"] = "transformer"

    @property
    def state_grows(self) -> bool:
        return any(self.mixer_of(layer) != "k2" and self.window_of(layer) is None for layer in range(self.layers))


class SequenceClassifierConfig(BlocksConfig):
    """Blocks between an embedding with learned positions and a linear map to classes."""

    kind: Literal["sequence-classifier"] = "sequence-classifier"
    vocabulary: Vocabulary  # v, with 0 for padding
    length: Annotated[int, Field(ge=1, le=1 << 24)]  # positions that are learned
    classes: Vocabulary
    rotary: bool = False
    causal: bool = True  # positions see those before them only, or all
    # What is read out: the mean over the positions that are not padding, or a class token after the last of them.
    pooling: Literal["mean", "class"] = "mean"

    @model_validator(mode="after")
    def _classifies(self) -> Self:
        if self.value_embeddings:
            raise ValueError("value_embeddings: language models only")
        if not self.causal and "k2" in self.mixers:
            raise ValueError(
                "causal: k2 mixes with the past only; allowed with causal = false: gaussian, hierarchical, softmax"
            )
        if not self.causal and self.window is not None:
            raise ValueError("window: goes with causal = true")
        return self


# Hidden widths are multiples of this, so that rows fill whole vectors of 8 float32.
HIDDEN_MULTIPLE = 8


def kind_of(values: Any) -> str:
    """Which configuration nested values are of."""
    return str(values.get("kind", "k-stack") if isinstance(values, dict) else getattr(values, "kind", "k-stack"))


LanguageModelConfig = Annotated[
    Annotated[ModelConfig, Tag("k-stack")] | Annotated[TransformerConfig, Tag("transformer")], Discriminator(kind_of)
]
