"""Labelled examples of any kind, and their parts."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kmixer.errors import InputError
from kmixer.files import user_cache

# Splits are cut from one shuffled order, the same in every run.
SPLIT_SEED = 0


@dataclass(frozen=True)
class Examples:
    """Inputs (n, ...) of one part, and their classes (n,)."""

    inputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class ExampleDataset:
    """The parts of a dataset, and the sha256 of what is not held back for testing."""

    train: Examples
    validation: Examples
    test: Examples | None
    sha256: str


def find_file(what: str, pattern: str, data_dir: Path | None, otherwise: str) -> Path:
    """The first file of a pattern in the given folder or the cache, below them too.

    Raises InputError where there is none: that `what` is not there, and what to do `otherwise`.
    """
    folders = [folder for folder in (data_dir, user_cache() / "data") if folder is not None]
    paths = [path for folder in folders for path in sorted(folder.glob(f"**/{pattern}"))]
    if not paths:
        raise InputError(f"{what} is not in {' nor in '.join(map(str, folders))}; {otherwise}")
    return paths[0]


def split_examples(
    examples: Examples, validation: float, test: float, own_test: Examples | None = None
) -> ExampleDataset:
    """Cut examples into parts by fractions; the test part may be one that the dataset brings.

    Raises InputError where the training or the validation part is empty.
    """
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(SPLIT_SEED))
    held, tested = round(validation * len(examples)), round(test * len(examples))
    indices = order.split([len(examples) - held - tested, held, tested])
    parts = [Examples(examples.inputs[part], examples.labels[part]) for part in indices]
    if len(parts[0]) == 0 or len(parts[1]) == 0:
        raise InputError(f"data: validation {validation} and test {test} leave a part empty")
    tested_on = own_test or (parts[2] if len(parts[2]) else None)
    return ExampleDataset(parts[0], parts[1], tested_on, digest(examples))


def digest(examples: Examples) -> str:
    """sha256 of inputs and labels."""
    return hashlib.sha256(examples.inputs.numpy().tobytes() + examples.labels.numpy().tobytes()).hexdigest()
