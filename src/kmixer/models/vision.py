"""A vision transformer as DeiT builds it, with any mixer that sees both ways.

    patches -> linear map, class token in front, learned positions
    x = x + DropPath(mixer(LayerNorm(x))), then x = x + DropPath(MLP(LayerNorm(x))), in every block
    LayerNorm -> the class token -> linear map to the classes

Sources: Dosovitskiy et al. 2021, Touvron et al. 2021; with Gaussian attention Kundu et al. 2026.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from pydantic import Field, model_validator
from torch import Tensor, nn

from kmixer.config import Layers, Vocabulary, Width
from kmixer.errors import InputError
from kmixer.layers.feed_forward import INITIAL_STD, linear
from kmixer.layers.rotary import check_heads
from kmixer.models.config import MixersConfig, Probability
from kmixer.models.flops import linear_flops, mixing_flops
from kmixer.models.mixers.registry import Place, build_mixer

LAYER_NORM_EPS = 1e-6


class VisionConfig(MixersConfig):
    """Everything that determines a vision transformer's function but the weights."""

    kind: Literal["vit"] = "vit"
    image_size: Width  # pixels of a side
    channels: Width = 3
    patch_size: Width  # pixels of a side
    classes: Vocabulary
    width: Width  # d
    layers: Layers
    mlp_multiplier: Annotated[float, Field(gt=0, le=1024)] = 4.0  # hidden width over d
    drop_path: Probability = 0.0  # of the last block; the first has none, those between in proportion
    dropout: Probability = 0.0  # on the hidden units

    @model_validator(mode="after")
    def _fits(self) -> VisionConfig:
        check_heads(self.width, self.heads, rotary=False)
        if self.image_size % self.patch_size:
            raise ValueError(f"patch_size: got {self.patch_size}; it must divide image_size {self.image_size}")
        if "k2" in self.mixers:
            raise ValueError("mixers: k2 mixes with the past only; allowed for images: gaussian, hierarchical, softmax")
        return self

    @property
    def tokens(self) -> int:
        """Positions of an image: its patches and the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1


class DropPath(nn.Module):
    """Leave a branch out for some of the examples of a batch, and scale it up for the others (Huang et al. 2016)."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        if not self.training or self.probability == 0:
            return x
        kept = 1 - self.probability
        return x * (torch.rand(len(x), 1, 1, device=x.device) < kept) / kept


class VisionBlock(nn.Module):
    """x + DropPath(mixer(LayerNorm(x))), then x + DropPath(MLP(LayerNorm(x)))."""

    def __init__(self, config: VisionConfig, layer: int) -> None:
        super().__init__()
        place = Place(config.width, causal=False, rotary=False, bias=True)
        hidden = round(config.mlp_multiplier * config.width)
        self.mixing_norm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.mixer: Any = build_mixer(config.mixer_of(layer), config, place)
        self.feed_forward_norm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.up = linear(config.width, hidden)
        self.down = linear(hidden, config.width)
        self.dropout = config.dropout
        self.drop_path = DropPath(config.drop_path * layer / max(1, config.layers - 1))

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        x = x + self.drop_path(self.mixer(self.mixing_norm(x))[0])
        hidden = F.dropout(F.gelu(self.up(self.feed_forward_norm(x))), self.dropout, self.training)
        return x + self.drop_path(self.down(hidden))


class VisionTransformer(nn.Module):
    """Images (b, c, h, w) of any numbers, as they are in the data, to logits of the classes (b, k).

    Each channel is normalised with `pixel_mean` and `pixel_deviation` (c,), which are saved with the weights.

    Raises InputError for images of another size or number of channels.
    """

    pixel_mean: Tensor
    pixel_deviation: Tensor

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("pixel_mean", torch.zeros(config.channels))
        self.register_buffer("pixel_deviation", torch.ones(config.channels))
        self.patches = linear(config.channels * config.patch_size**2, config.width)
        self.class_token = nn.Parameter(INITIAL_STD * torch.randn(config.width))
        self.positions = nn.Parameter(INITIAL_STD * torch.randn(config.tokens, config.width))
        self.blocks = nn.ModuleList(VisionBlock(config, layer) for layer in range(config.layers))
        self.norm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.head = linear(config.width, config.classes)

    def forward(self, images: Shaped[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        config, side = self.config, self.config.patch_size
        expected = (config.channels, config.image_size, config.image_size)
        if images.shape[1:] != expected:
            raise InputError(f"images: got {tuple(images.shape[1:])}; this model takes {expected}")
        normalised = (images.to(self.pixel_mean) - self.pixel_mean[:, None, None]) / self.pixel_deviation[:, None, None]
        # (b, c, rows, side, columns, side) -> (b, rows columns, c side side)
        cut = normalised.unflatten(3, (-1, side)).unflatten(2, (-1, side)).permute(0, 2, 4, 1, 3, 5)
        x = self.patches(cut.flatten(3).flatten(1, 2))
        first = self.class_token.to(x.dtype).expand(len(x), 1, -1)
        x = torch.cat([first, x], dim=1) + self.positions
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x[:, 0]))
        return logits

    def patch_places(self) -> Float[Tensor, "n 2"]:
        """Row and column of every patch, in patches: of the positions after the class token."""
        side = torch.arange(self.config.image_size // self.config.patch_size, dtype=torch.float32)
        return torch.cartesian_prod(side, side)

    def compile_layers(self, backend: str = "inductor") -> None:
        """Let torch.compile translate each kind of block once, for every block of it and batch size."""
        for block in self.blocks:
            block.compile(dynamic=True, fullgraph=True, backend=backend)


def count_image_flops(model: VisionTransformer) -> float:
    """Operations of the forward pass of one image: matrix products and attention; see `count_flops`."""
    tokens = model.config.tokens
    patches = (tokens - 1) * linear_flops(model.patches)
    blocks = tokens * (linear_flops(model.blocks) + mixing_flops(model.blocks, tokens))
    return patches + blocks + linear_flops(model.head)
