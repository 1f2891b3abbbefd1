"""What the configurations of all stacks have in common."""

from __future__ import annotations

from kmixer.config import Layers, Probability, StrictConfig, Width
from kmixer.models.heads import HeadConfig


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
