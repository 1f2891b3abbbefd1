"""Classification as a training task: random examples with their classes, cross-entropy and accuracy."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kmixer.data.examples import ExampleDataset, Examples
from kmixer.data.images import augmented, channel_statistics, load_images
from kmixer.data.sequences import load_sequences
from kmixer.errors import InputError
from kmixer.measure.dynamics import measure_mixers
from kmixer.measure.locality import attention_rollout, attention_weights
from kmixer.models.classifiers import Classifier, build_classifier, count_example_flops
from kmixer.models.model_folder import save_config, save_weights
from kmixer.models.sequence_classifier import lengths_of
from kmixer.models.vision import VisionTransformer
from kmixer.runs.recipe import ClassificationRecipe, ImageRecipe, SequenceRecipe
from kmixer.training.task import Task

# Tokens of one forward pass of an evaluation, and of the look at all attention weights.
TOKENS_PER_BATCH, LOCALITY_TOKENS = 32768, 2048
# Images whose class token is kept in results.json.
SHOWN_EXAMPLES = 6


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
        self.recipe, self.dataset = recipe, dataset
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
        was_training = model.training
        model.eval()
        total, right = 0.0, 0
        size = self.examples_per_batch
        for inputs, labels in zip(part.inputs.split(size), part.labels.split(size), strict=True):
            logits = self.logits(model, self.prepared(inputs.to(device))).cpu().double()
            total += float(F.cross_entropy(logits, labels, reduction="sum"))
            right += int((logits.argmax(-1) == labels).sum())
        model.train(was_training)
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


class ImageTask(ClassificationTask):
    """Images, varied in training as the recipe says, and normalised by the model."""

    unit = "images"
    recipe: ImageRecipe

    def __init__(self, recipe: ImageRecipe, data_dir: Path | None = None) -> None:
        super().__init__(recipe, load_images(recipe.data, data_dir))

    def check(self) -> None:
        model = self.recipe.model
        expected = (model.channels, model.image_size, model.image_size)
        for name, part in self.parts().items():
            if part.inputs.shape[1:] != expected:
                raise InputError(
                    f"the {name} images of {self.recipe.dataset} are {tuple(part.inputs.shape[1:])}; the recipe's "
                    f"model takes {expected}"
                )
        self.check_labels(model.classes)

    def build_model(self) -> Classifier:
        model = super().build_model()
        assert isinstance(model, VisionTransformer)
        model.pixel_mean, model.pixel_deviation = channel_statistics(self.dataset.train.inputs)
        return model

    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        pixels, labels = super().batch(generator)
        return augmented(pixels, self.recipe.data.augment, generator), labels

    def final_measures(self, model: Classifier) -> dict[str, Any]:
        """Loss and accuracy of every part, and `class_token`."""
        return super().final_measures(model) | self.class_token(model)

    def analyze(self, model: Classifier) -> dict[str, Any]:
        return super().analyze(model) | self.class_token(model)

    def class_token(self, model: Classifier) -> dict[str, Any]:
        """A few images, and what the class token holds of each patch; nothing where a layer has no weights."""
        shown = self.dataset.validation.inputs[:SHOWN_EXAMPLES]
        weights = attention_weights(model, shown.to(model.head.weight.device))
        if len(weights) < self.recipe.model.layers:  # output fusion has none
            return {}
        rollout = attention_rollout(weights)[:, 0, 1:]
        return {"class_token": {"images": shown.tolist(), "rollout": rollout.tolist()}}


class SequenceTask(ClassificationTask):
    """Token sequences, padded at the end; a batch is as long as its longest."""

    unit = "sequences"
    recipe: SequenceRecipe

    def __init__(self, recipe: SequenceRecipe, data_dir: Path | None = None) -> None:
        super().__init__(recipe, load_sequences(recipe.data, data_dir))

    def check(self) -> None:
        model = self.recipe.model
        for name, part in self.parts().items():
            longest, largest = part.inputs.shape[1], int(part.inputs.max()) + 1
            if longest > model.length or largest > model.vocabulary:
                raise InputError(
                    f"the {name} sequences of {self.recipe.dataset} have {longest} tokens of {largest} kinds; the "
                    f"recipe's model takes {model.length} of {model.vocabulary}"
                )
            if int(lengths_of(part.inputs).min()) == 0:
                raise InputError(f"the {name} part of {self.recipe.dataset} has an empty sequence, which has no class")
        self.check_labels(model.classes)

    def prepared(self, inputs: Tensor) -> Tensor:
        longest = int(lengths_of(inputs).max())
        return inputs[:, :longest].long()

    def logits(self, model: Any, inputs: Tensor) -> Tensor:
        logits: Tensor = model.classify_together(inputs)
        return logits

    def _measure(self, model: Classifier, part: Examples) -> ClassificationEvaluation:
        order = lengths_of(part.inputs).argsort(stable=True)  # neighbours of one length need little padding
        return super()._measure(model, Examples(part.inputs[order], part.labels[order]))

    @property
    def examples_per_batch(self) -> int:
        return max(1, TOKENS_PER_BATCH // self.recipe.model.length)

    def looked_at(self) -> Tensor:
        """The longest sequences, cut to the shortest of them: attention to padding would mean nothing."""
        inputs = self.dataset.validation.inputs
        lengths, order = lengths_of(inputs).sort(descending=True, stable=True)
        count = max(1, LOCALITY_TOKENS // self.recipe.model.length)
        return inputs[order[:count], : int(lengths[:count].min())]


def open_classification(recipe: ClassificationRecipe, data_dir: Path | None = None) -> ClassificationTask:
    """A classification recipe with its data."""
    if isinstance(recipe, ImageRecipe):
        return ImageTask(recipe, data_dir)
    assert isinstance(recipe, SequenceRecipe)
    return SequenceTask(recipe, data_dir)
