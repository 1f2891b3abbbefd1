"""Laws of the vision transformer and of its parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import gelu

from kmixer.errors import InputError
from kmixer.layers.block import drop_path
from kmixer.models.flops import operations
from kmixer.models.vision import VisionConfig, VisionTransformer, count_image_flops

VALUES = {"image_size": 8, "channels": 3, "patch_size": 4, "classes": 5, "width": 12, "layers": 2, "heads": 3}
mixers = pytest.mark.parametrize("mixer", ["softmax", "gaussian", "hierarchical", "sinkhorn"])
poolings = pytest.mark.parametrize("pooling", ["class", "mean"])


def make_model(mixer: str = "softmax", **values: Any) -> VisionTransformer:
    torch.manual_seed(0)
    config = VisionConfig.parse(VALUES | {"mixers": mixer} | values, source="test")
    model = VisionTransformer(config).double().eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def images(n: int = 4) -> torch.Tensor:
    return torch.randn(n, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(n))


@mixers
@poolings
def test_it_is_its_formula(mixer: str, pooling: str) -> None:
    model, x = make_model(mixer, pooling=pooling), images(1)
    patches = [x[0, :, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4].flatten() for i in range(2) for j in range(2)]
    first = [model.class_token] if model.class_token is not None else []
    h = torch.stack([*first, *(model.patches(patch) for patch in patches)]) + model.positions
    for block in model.blocks:
        h = h + block.mixer(block.mixing_norm(h)[None])[0][0]
        h = h + block.feed_forward.down(gelu(block.feed_forward.up(block.feed_forward_norm(h))))
    pooled = model.norm(h[0]) if pooling == "class" else sum(map(model.norm, h)) / 4
    torch.testing.assert_close(model(x)[0], model.head(pooled))


def test_without_positions_the_mean_forgets_where_patches_were() -> None:
    model, x = make_model(pooling="mean"), images()
    torch.nn.init.zeros_(model.positions)
    torch.testing.assert_close(model(x), model(x.roll(4, -1)))
    assert "class_token" not in model.state_dict()


def test_a_class_token_costs_what_its_position_does() -> None:
    without, with_token = (count_image_flops(make_model(pooling=pooling)) for pooling in ("mean", "class"))
    blocks = operations(make_model().blocks, 5) * 5 - operations(make_model().blocks, 4) * 4
    assert with_token - without == pytest.approx(blocks)


@mixers
@poolings
def test_images_of_a_batch_are_independent(mixer: str, pooling: str) -> None:
    model, x = make_model(mixer, pooling=pooling), images()
    whole = model(x)
    for i in range(4):
        torch.testing.assert_close(model(x[i : i + 1]), whole[i : i + 1])


@mixers
@poolings
def test_every_parameter_gets_a_gradient(mixer: str, pooling: str) -> None:
    model = make_model(mixer, pooling=pooling)
    model(images()).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_pixels_are_normalised_and_the_statistics_are_saved() -> None:
    model, x = make_model(), images()
    model.pixel_mean, model.pixel_deviation = torch.tensor([1.0, 2, 3]).double(), torch.tensor([2.0, 4, 5]).double()
    scaled = x * model.pixel_deviation[:, None, None] + model.pixel_mean[:, None, None]
    plain = make_model()
    torch.testing.assert_close(model(scaled), plain(x))
    assert {"pixel_mean", "pixel_deviation"} <= set(model.state_dict())


def test_drop_path_keeps_the_mean_and_acts_in_training_only() -> None:
    torch.manual_seed(0)
    dropped = drop_path(torch.ones(4000, 1, 1), 0.25)
    assert dropped.unique().tolist() == pytest.approx([0, 4 / 3])
    assert dropped.mean() == pytest.approx(1, abs=0.05)
    model, x = make_model(drop_path=0.9), images(20)
    assert torch.equal(model(x), make_model()(x))
    assert not torch.equal(model.train()(x), make_model()(x))
    rates = [block.drop_path for block in make_model(drop_path=0.3, layers=4).blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(InputError, match=r"images: got \(3, 8, 9\); this model takes \(3, 8, 8\)"):
        make_model()(torch.zeros(1, 3, 8, 9))
    with pytest.raises(InputError, match="patch_size: got 3; it must divide image_size 8"):
        make_model(patch_size=3)
    with pytest.raises(InputError, match="mixers: k2 mixes with the past only; allowed for images: gaussian"):
        make_model("k2")
