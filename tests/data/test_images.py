"""Image datasets: found, split without overlap, varied repeatably."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from kmixer.data.config import ImageDataConfig
from kmixer.data.images import AUGMENTATIONS, channel_statistics, load_images, shift
from kmixer.errors import InputError


def write_npz(folder: Path, n: int = 40) -> Path:
    rng = np.random.default_rng(0)
    arrays = {
        "x_train": rng.integers(0, 256, (n, 8, 8, 3), dtype=np.uint8),
        "y_train": np.arange(n) % 4,
        "x_test": rng.integers(0, 256, (10, 8, 8, 3), dtype=np.uint8),
        "y_test": np.arange(10) % 4,
    }
    np.savez(folder / "cifar10_part.npz", **arrays)
    return folder / "cifar10_part.npz"


def test_the_digits_are_split_without_overlap() -> None:
    pytest.importorskip("sklearn")
    found = load_images(ImageDataConfig(dataset="digits", validation=0.2, test=0.2))
    assert found.test is not None
    assert (len(found.train), len(found.validation), len(found.test)) == (1079, 359, 359)
    assert found.train.inputs.shape[1:] == (1, 8, 8)
    every = torch.cat([part.inputs.flatten(1) for part in (found.train, found.validation, found.test)])
    assert len(every) == 1797
    again = load_images(ImageDataConfig(dataset="digits", validation=0.2, test=0.2))
    assert torch.equal(again.validation.labels, found.validation.labels)
    assert again.sha256 == found.sha256
    mean, deviation = channel_statistics(found.train.inputs)
    torch.testing.assert_close(mean, found.train.inputs.float().mean((0, 2, 3)))
    assert bool((deviation > 0).all())


def test_a_file_of_arrays_has_its_own_test_part(tmp_path: Path) -> None:
    path = write_npz(tmp_path)
    by_name = load_images(ImageDataConfig(dataset="cifar10", validation=0.1), tmp_path)
    by_path = load_images(ImageDataConfig(dataset=str(path), validation=0.1))
    assert by_name.sha256 == by_path.sha256
    assert by_name.test is not None
    assert (len(by_name.train), len(by_name.validation), len(by_name.test)) == (36, 4, 10)
    with np.load(path) as arrays:
        assert np.array_equal(by_name.test.inputs.permute(0, 2, 3, 1).numpy(), arrays["x_test"])
    with pytest.raises(InputError, match=r"data.test: got 0.1; cifar10 has a test part of its own, so give 0"):
        load_images(ImageDataConfig(dataset="cifar10", validation=0.1, test=0.1), tmp_path)


def test_what_is_missing_or_broken_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"dataset cifar10 is not in .*; put cifar10.npz there"):
        load_images(ImageDataConfig(dataset="cifar10", validation=0.1), tmp_path)
    with pytest.raises(InputError, match="there is no such file"):
        load_images(ImageDataConfig(dataset="no.npz", validation=0.1))
    broken = tmp_path / "broken.npz"
    np.savez(broken, x_train=np.zeros(3))
    with pytest.raises(InputError, match="does not hold x_train, y_train, x_test and y_test"):
        load_images(ImageDataConfig(dataset=str(broken), validation=0.1))
    np.savez(broken, **{f"x_{part}": np.zeros((2, 3, 3)) for part in ("train", "test")}, y_train=[0, 1], y_test=[0, 1])
    with pytest.raises(InputError, match=r"x_train is float64 \(2, 3, 3\); it should be uint8"):
        load_images(ImageDataConfig(dataset=str(broken), validation=0.1))
    images = {f"x_{part}": np.zeros((2, 3, 3, 1), dtype=np.uint8) for part in ("train", "test")}
    np.savez(broken, **images, y_train=["a", "b"], y_test=[0, 1])
    with pytest.raises(InputError, match=r"y_train is .*; it should be whole numbers"):
        load_images(ImageDataConfig(dataset=str(broken), validation=0.1))
    np.savez(broken, **images, y_train=[0, 1], y_test=[0, 1])
    whole = broken.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 4] ^= 0xFF
    for content in (b"", whole[: len(whole) // 2], bytes(flipped)):
        broken.write_bytes(content)
        with pytest.raises(InputError, match="does not hold x_train, y_train, x_test and y_test"):
            load_images(ImageDataConfig(dataset=str(broken), validation=0.1))
    with broken.open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(InputError, match="does not hold x_train, y_train, x_test and y_test"):
        load_images(ImageDataConfig(dataset=str(broken), validation=0.1))
    objects = np.array([{"a": 1}], dtype=object)
    np.savez(broken, x_train=objects, y_train=objects, x_test=objects, y_test=objects)
    with pytest.raises(InputError, match=r"broken\.npz does not hold"):  # and nothing was unpickled
        load_images(ImageDataConfig(dataset=str(broken), validation=0.1))


@pytest.mark.parametrize("kind", ["shift", "shift_and_flip"])
def test_variations_are_repeatable_and_move_pixels_only(kind: str) -> None:
    pixels = torch.randint(1, 256, (200, 2, 8, 8), dtype=torch.uint8)
    vary = AUGMENTATIONS[kind]  # type: ignore[index]
    assert vary is not None
    first, second = (vary(pixels, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert first.shape == pixels.shape
    assert not torch.equal(first, pixels)


def test_deit_variations_are_repeatable_and_leave_the_global_generator() -> None:
    pytest.importorskip("torchvision")
    pixels = torch.randint(1, 256, (6, 3, 32, 32), dtype=torch.uint8)
    before = torch.get_rng_state()
    first, second, other = (AUGMENTATIONS["deit"](pixels, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))  # type: ignore[misc]
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert (first.shape, first.dtype) == (pixels.shape, torch.uint8)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_shift_is_one_of_nine() -> None:
    pixels = torch.randint(1, 256, (300, 1, 8, 8), dtype=torch.uint8)
    moved = shift(pixels, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(pixels, (1, 1, 1, 1))
    seen = set()
    for image in range(300):
        places = [
            (i, j)
            for i in range(3)
            for j in range(3)
            if torch.equal(moved[image], padded[image, :, i : i + 8, j : j + 8])
        ]
        assert len(places) == 1
        seen.add(places[0])
    assert len(seen) == 9
