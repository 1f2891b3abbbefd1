"""Labelled images: where they are found, how they are split, and how training varies them."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from kmixer.data.config import Augmentation, ImageDataConfig
from kmixer.data.examples import ExampleDataset, Examples, find_file, split_examples
from kmixer.errors import InputError

# A channel that is the same everywhere is not scaled up without end.
MIN_DEVIATION = 1e-3


def load_images(config: ImageDataConfig, data_dir: Path | None = None) -> ExampleDataset:
    """Find a dataset and cut it into parts.

    "digits" comes with scikit-learn. "cifar10" and any other name is a file NAME.npz in `data_dir` or the cache
    folder, or a path to one: arrays x_train (n, h, w, c) uint8, y_train, x_test, y_test; nothing pickled.
    Where the dataset has a test part of its own, `test` must be 0 and that part is used.

    Raises:
        InputError: a dataset that is not there, a file that does not hold those arrays, an empty part.
    """
    if config.dataset == "digits":
        pixels, labels = _digits()
        own_test = None
    else:
        pixels, labels, own_test = read_arrays(find_arrays(config.dataset, data_dir))
    if own_test is not None and config.test:
        raise InputError(f"data.test: got {config.test}; {config.dataset} has a test part of its own, so give 0")
    return split_examples(Examples(pixels, labels), config.validation, config.test, own_test)


def channel_statistics(pixels: UInt8[Tensor, "n c h w"]) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"]]:
    """Mean and deviation of each channel."""
    channels = pixels.float().transpose(0, 1).flatten(1)
    return channels.mean(1), channels.std(1).clamp(min=MIN_DEVIATION)


def _digits() -> tuple[Tensor, Tensor]:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise InputError(
            "dataset digits comes with scikit-learn, which is not installed: pip install 'kmixer[vision]'"
        ) from None
    digits = load_digits()
    pixels = torch.from_numpy(digits.images.astype(np.uint8))[:, None]  # 0 to 16
    return pixels, torch.from_numpy(digits.target.astype(np.int64))


def find_arrays(name: str, data_dir: Path | None) -> Path:
    """The .npz file of a dataset. Raises InputError where there is none."""
    if Path(name).suffix == ".npz":
        if Path(name).is_file():
            return Path(name)
        raise InputError(f"dataset {name}: there is no such file")
    return find_file(
        f"dataset {name}",
        f"{name}*.npz",
        data_dir,
        f"put {name}.npz there (x_train, y_train, x_test, y_test), give its folder with --data-dir, or use dataset "
        "digits, which needs no file",
    )


def read_arrays(path: Path) -> tuple[Tensor, Tensor, Examples]:
    """Training pixels (n, c, h, w) and labels, and the test part."""
    try:
        # Opened here: where it is damaged, numpy would not close it.
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = {key: file[key] for key in ("x_train", "y_train", "x_test", "y_test")}
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path} does not hold x_train, y_train, x_test and y_test: {error}") from None

    def part(name: str) -> tuple[Tensor, Tensor]:
        pixels, labels = arrays[f"x_{name}"], arrays[f"y_{name}"].reshape(-1)
        if pixels.ndim != 4 or pixels.dtype != np.uint8 or len(pixels) != len(labels) or len(labels) == 0:
            raise InputError(f"{path}: x_{name} is {pixels.dtype} {pixels.shape}; it should be uint8 (n, h, w, c)")
        if not np.issubdtype(labels.dtype, np.integer):
            raise InputError(f"{path}: y_{name} is {labels.dtype}; it should be whole numbers")
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels.astype(np.int64))

    return *part("train"), Examples(*part("test"))


# --- variations of training images ----------------------------------------------------------------


def shift(pixels: UInt8[Tensor, "n c h w"], generator: torch.Generator) -> UInt8[Tensor, "n c h w"]:
    """Move every image by up to an eighth of its size in each direction; zeros come in."""
    n, _, height, width = pixels.shape
    pad = max(1, height // 8)
    padded = F.pad(pixels, (pad,) * 4)
    down, right = torch.randint(2 * pad + 1, (2, n), generator=generator, device=pixels.device)
    rows = (torch.arange(height, device=pixels.device) + down[:, None])[:, None, :, None]
    columns = (torch.arange(width, device=pixels.device) + right[:, None])[:, None, None, :]
    images = torch.arange(n, device=pixels.device)[:, None, None, None]
    channels = torch.arange(pixels.shape[1], device=pixels.device)[None, :, None, None]
    return padded[images, channels, rows, columns]


def shift_and_flip(pixels: UInt8[Tensor, "n c h w"], generator: torch.Generator) -> UInt8[Tensor, "n c h w"]:
    """`shift`, and half of the images mirrored."""
    mirrored = torch.rand(len(pixels), generator=generator, device=pixels.device) < 0.5
    moved = shift(pixels, generator)
    return torch.where(mirrored[:, None, None, None], moved.flip(-1), moved)


def deit(pixels: UInt8[Tensor, "n c h w"], generator: torch.Generator) -> UInt8[Tensor, "n c h w"]:
    """`shift_and_flip`, then torchvision's RandAugment (2 operations of magnitude 9) and random erasing (of a quarter).

    Not the whole recipe of DeiT: it has random resized crops in the place of shifts, and mixup, CutMix and label
    smoothing, which mix examples and change targets.
    """
    try:
        from torchvision.transforms import v2
    except ImportError:
        raise InputError(
            "data.augment 'deit' needs torchvision, which is not installed; allowed without it: none, shift, "
            "shift_and_flip"
        ) from None
    steps = v2.Compose([v2.RandAugment(2, 9), v2.RandomErasing(p=0.25)])
    with torch.random.fork_rng([]):  # torchvision draws from the global generator
        torch.manual_seed(int(torch.randint(1 << 31, (1,), generator=generator, device=pixels.device)))
        return torch.stack([steps(image) for image in shift_and_flip(pixels, generator)])


AUGMENTATIONS: dict[Augmentation, Callable[[Tensor, torch.Generator], Tensor] | None] = {
    "none": None,
    "shift": shift,
    "shift_and_flip": shift_and_flip,
    "deit": deit,
}


def augmented(pixels: Tensor, kind: Augmentation, generator: torch.Generator) -> Tensor:
    """Training images varied as a recipe says."""
    vary = AUGMENTATIONS[kind]
    return pixels if vary is None else vary(pixels, generator)
