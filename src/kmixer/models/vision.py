"""A vision transformer as DeiT builds it, with any mixer that sees both ways.

    patches -> linear map, class token in front of them, learned positions
    x = x + DropPath(mixer(norm(x))), then x = x + DropPath(MLP(norm(x))), in every block
    norm -> the class token, or the mean over patches where there is none -> linear map to the classes

Sources: Dosovitskiy et al. 2021, Touvron et al. 2021; with Gaussian attention Kundu et al. 2026.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from jaxtyping import Float, Shaped
from pydantic import Field, model_validator
from torch import Tensor, nn

from kmixer.config import Layers, Probability, Vocabulary, Width
from kmixer.errors import InputError
from kmixer.layers.block import Block
from kmixer.layers.feed_forward import FeedForward
from kmixer.layers.linear import INITIAL_STD, linear
from kmixer.layers.roles import TABLE, VECTOR, Role
from kmixer.layers.rotary import check_heads
from kmixer.models.flops import operations
from kmixer.models.mixers.card import Place
from kmixer.models.mixers.choice import MixersConfig, both_ways, build_mixer
from kmixer.models.mixers.cost import linear_operations
from kmixer.models.norm_config import VisionNormConfig


class VisionConfig(MixersConfig):
    """Everything that determines a vision transformer's function but the weights."""

    kind: Literal["vit"] = "vit"
    image_size: Width  # pixels of a side
    channels: Width = 3
    patch_size: Width  # pixels of a side
    classes: Vocabulary
    width: Width  # d
    layers: Layers
    norm: VisionNormConfig = VisionNormConfig()  # LayerNorm
    mlp_multiplier: Annotated[float, Field(gt=0, le=1024)] = 4.0  # hidden width over d
    drop_path: Probability = 0.0  # of the last block; the first has none, those between in proportion
    dropout: Probability = 0.0  # on the hidden units
    pooling: Literal["class", "mean"] = "class"  # what is read out: a class token, or the mean over patches

    @model_validator(mode="after")
    def _fits(self) -> VisionConfig:
        check_heads(self.width, self.heads, rotary=False)
        if self.image_size % self.patch_size:
            raise ValueError(f"patch_size: got {self.patch_size}; it must divide image_size {self.image_size}")
        if self.causal_mixer is not None:
            raise ValueError(f"mixers: {self.causal_mixer} mixes with the past only; allowed for images: {both_ways()}")
        return self

    @property
    def tokens(self) -> int:
        """Positions of an image: its patches, and the class token where it has one."""
        return (self.image_size // self.patch_size) ** 2 + (self.pooling == "class")


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
        with_token = config.pooling == "class"
        self.class_token = nn.Parameter(INITIAL_STD * torch.randn(config.width)) if with_token else None
        self.positions = nn.Parameter(INITIAL_STD * torch.randn(config.tokens, config.width))
        self.blocks = nn.ModuleList(build_vision_block(config, layer) for layer in range(config.layers))
        self.norm = config.norm.build(config.width, "final")
        self.head = linear(config.width, config.classes)

    def roles(self) -> dict[str, Role]:
        token = {} if self.class_token is None else {"class_token": VECTOR}
        return {"patches.weight": TABLE, "positions": TABLE, "head.weight": TABLE, **token}

    def forward(self, images: Shaped[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        config, side = self.config, self.config.patch_size
        expected = (config.channels, config.image_size, config.image_size)
        if images.shape[1:] != expected:
            raise InputError(f"images: got {tuple(images.shape[1:])}; this model takes {expected}")
        normalised = (images.to(self.pixel_mean) - self.pixel_mean[:, None, None]) / self.pixel_deviation[:, None, None]
        # (b, c, rows, side, columns, side) -> (b, rows columns, c side side)
        cut = normalised.unflatten(3, (-1, side)).unflatten(2, (-1, side)).permute(0, 2, 4, 1, 3, 5)
        x = self.patches(cut.flatten(3).flatten(1, 2))
        if self.class_token is not None:
            x = torch.cat([self.class_token.to(x.dtype).expand(len(x), 1, -1), x], dim=1)
        x = x + self.positions
        for block in self.blocks:
            x, _ = block(x)
        pooled = self.norm(x).mean(1) if self.class_token is None else self.norm(x[:, 0])
        logits: Tensor = self.head(pooled)
        return logits

    def patch_places(self) -> Float[Tensor, "n 2"]:
        """Row and column of every patch, in patches: of the last positions, all but a class token."""
        side = torch.arange(self.config.image_size // self.config.patch_size, dtype=torch.float32)
        return torch.cartesian_prod(side, side)

    def compile_layers(self, backend: str = "inductor") -> None:
        """Let torch.compile translate each kind of block once, for every block of it and batch size."""
        for block in self.blocks:
            block.compile(dynamic=True, fullgraph=True, backend=backend)


def build_vision_block(config: VisionConfig, layer: int) -> Block:
    """The block of a layer, with fresh weights; the last has the configured drop path, the first none."""
    width = config.width
    before_mixing, before_feed_forward = config.norm.before_branches(width)
    return Block(
        before_mixing,
        build_mixer(config.mixer_of(layer), config, Place(width, causal=False, rotary=False, bias=True)),
        before_feed_forward,
        FeedForward(width, hidden_width=round(config.mlp_multiplier * width), dropout=config.dropout),
        drop_path=config.drop_path * layer / max(1, config.layers - 1),
    )


def count_image_flops(model: VisionTransformer) -> float:
    """Operations of the forward pass of one image: matrix products and attention; see `count_flops`."""
    tokens = model.config.tokens
    patches = len(model.patch_places()) * linear_operations(model.patches)
    return patches + tokens * operations(model.blocks, tokens) + linear_operations(model.head)
