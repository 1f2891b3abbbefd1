"""What classifiers of images and of sequences share as a training task: random examples, cross-entropy, accuracy."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kmixer.data.examples import ExampleDataset, Examples
from kmixer.errors import InputError
from kmixer.measure.dynamics import measure_mixers
from kmixer.measure.evaluating import evaluating
from kmixer.models.classifiers import Classifier, build_classifier, count_example_flops
from kmixer.models.model_folder import save_config, save_weights
from kmixer.runs.recipe import ClassificationRecipe
from kmixer.training.task import Task


@dataclass(frozen=True)
class ClassificationEvaluation:
    """Mean cross-entropy and accuracy over all examples of a part."""

    protocol: Literal["examples"]
    examples: int
    loss: float  # nats an example
    accuracy: float  # part of the examples whose likeliest class is theirs

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def summary(self) -> str:
        return f"{self.loss:.4f} nats, accuracy {self.accuracy:.4f}"


class ClassificationTask(Task):
    """A classification recipe with its examples."""

    recipe: ClassificationRecipe

    def __init__(self, recipe: ClassificationRecipe, dataset: ExampleDataset) -> None:
        self.recipe, self.dataset = recipe.with_whole_path(), dataset
        self.corpus_sha256 = dataset.sha256
        self.train = dataset.train

    def parts(self) -> dict[str, Examples]:
        """The parts there are, by name."""
        data = self.dataset
        parts = {"training": data.train, "validation": data.validation, "test": data.test}
        return {name: part for name, part in parts.items() if part is not None}

    def check_labels(self, classes: int) -> None:
        """Raises InputError where a part, the test part too, has a label that the model has no class for."""
        for name, part in self.parts().items():
            lowest, highest = (int(label) for label in part.labels.aminmax())
            if lowest < 0 or highest >= classes:
                raise InputError(
                    f"the {name} part of {self.recipe.dataset} has labels {lowest} to {highest}; the recipe's model "
                    f"takes 0 to {classes - 1}"
                )

    def describe(self) -> list[str]:
        data, config = self.dataset, self.recipe.training
        parts = f"{len(data.train):,} training, {len(data.validation):,} validation"
        parts += "" if data.test is None else f", {len(data.test):,} test"
        return [
            f"{self.recipe.dataset}: {parts} {self.unit}",
            f"{config.steps:,} steps of {config.batch_size} {self.unit}",
        ]

    def build_model(self) -> Classifier:
        return build_classifier(self.recipe.model)

    def to(self, device: torch.device) -> None:
        self.train = Examples(self.train.inputs.to(device), self.train.labels.to(device))

    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        device = self.train.labels.device
        chosen = torch.randint(len(self.train), (self.recipe.units_per_step,), generator=generator, device=device)
        return self.train.inputs[chosen], self.train.labels[chosen]

    def loss(self, network: Any, inputs: Tensor, targets: Tensor) -> Tensor:
        logits = network(self.prepared(inputs))
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets)

    def prepared(self, inputs: Tensor) -> Tensor:
        """Inputs as the model takes them."""
        return inputs

    def logits(self, model: Any, inputs: Tensor) -> Tensor:
        """What an evaluation counts, for prepared inputs."""
        logits: Tensor = model(inputs)
        return logits

    def evaluate(self, model: Classifier) -> list[ClassificationEvaluation]:
        return [self._measure(model, self.dataset.validation)]

    @torch.no_grad()
    def _measure(self, model: Classifier, part: Examples) -> ClassificationEvaluation:
        device = model.head.weight.device
        total, right = 0.0, 0
        size = self.examples_per_batch
        with evaluating(model):
            for inputs, labels in zip(part.inputs.split(size), part.labels.split(size), strict=True):
                logits = self.logits(model, self.prepared(inputs.to(device))).cpu().double()
                total += float(F.cross_entropy(logits, labels, reduction="sum"))
                right += int((logits.argmax(-1) == labels).sum())
        return ClassificationEvaluation("examples", len(part), total / len(part), right / len(part))

    @property
    def examples_per_batch(self) -> int:
        """Examples of one forward pass of an evaluation."""
        return 256

    def dynamics(self, model: Classifier) -> dict[str, Any]:
        return measure_mixers(model, self.prepared(self.looked_at().to(model.head.weight.device)))

    def analyze(self, model: Classifier) -> dict[str, Any]:
        """Everything that can be measured of a model's mixers."""
        return self.dynamics(model)

    def looked_at(self) -> Tensor:
        """Validation inputs on which all attention weights are looked at."""
        return self.dataset.validation.inputs[:32]

    def save_config(self, folder: Path, model: Classifier) -> None:
        save_config(folder, model, None)

    def save_weights(self, folder: Path, model: Classifier, about: dict[str, Any]) -> None:
        save_weights(folder, model, None, about)

    def final_measures(self, model: Classifier) -> dict[str, Any]:
        """Loss and accuracy of every part."""
        parts = {"validation": self.dataset.validation, "test": self.dataset.test}
        return {name: [self._measure(model, part).to_json()] for name, part in parts.items() if part is not None}

    def forward_flops(self, model: Classifier) -> float:
        return self.recipe.units_per_step * count_example_flops(model)
