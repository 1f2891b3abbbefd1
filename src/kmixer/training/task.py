"""What the training loop has to know of a recipe's problem: its data, model, loss and measures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from kmixer.models.model_folder import Model
from kmixer.runs.recipe import AnyRecipe


class Measured(Protocol):
    """One evaluation of a model; the lowest `loss` chooses the weights that are kept."""

    @property
    def loss(self) -> float: ...

    def to_json(self) -> dict[str, Any]: ...

    def summary(self) -> str:
        """A few words for a line of progress."""
        ...


class Task(ABC):
    """A recipe with its data at hand."""

    recipe: AnyRecipe  # resolved: what the data decides is filled in
    corpus_sha256: str
    unit: str  # what throughput counts: tokens or images

    @abstractmethod
    def describe(self) -> list[str]:
        """Lines for the start of training: what data, what step."""

    @abstractmethod
    def check(self) -> None:
        """Raises InputError where the data does not fit the recipe."""

    @abstractmethod
    def build_model(self) -> Model:
        """The recipe's model with fresh weights from the global generator."""

    @abstractmethod
    def to(self, device: torch.device) -> None:
        """Move the training data to a device."""

    @abstractmethod
    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a step, of all processes, drawn with a generator on the data's device."""

    @abstractmethod
    def loss(self, network: Any, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean loss of some examples."""

    @abstractmethod
    def evaluate(self, model: Any) -> Sequence[Measured]:
        """Measures on the validation part; the first chooses the weights."""

    def dynamics(self, model: Any) -> dict[str, Any]:
        """What the model has learned, for the record of an evaluation."""
        return {}

    @abstractmethod
    def save_config(self, folder: Path, model: Any) -> None:
        """Write the model's configuration, and the tokenizer if there is one."""

    @abstractmethod
    def save_weights(self, folder: Path, model: Any, about: dict[str, Any]) -> None:
        """Write the model's weights."""

    @abstractmethod
    def final_measures(self, model: Any) -> dict[str, Any]:
        """For results.json: "validation" and, where it may be measured, "test", lists of measures; and more."""

    @abstractmethod
    def forward_flops(self, model: Any) -> float:
        """Operations of the forward pass of one step."""
