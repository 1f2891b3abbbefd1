"""Classification as a training task: random examples with their classes, cross-entropy and accuracy."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kmixer.data.examples import Examples
from kmixer.data.images import augmented, channel_statistics, load_images
from kmixer.errors import InputError
from kmixer.layers import GaussianAttention
from kmixer.models.model_folder import save_config, save_weights
from kmixer.models.vision import VisionTransformer, count_image_flops
from kmixer.training.locality import attention_rollout, attention_weights, measure_locality
from kmixer.training.recipe import ClassificationRecipe
from kmixer.training.task import Task

EXAMPLES_PER_BATCH = 256
# Images on which all attention weights are looked at.
LOCALITY_EXAMPLES = 32
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
    """A classification recipe with its images."""

    unit = "images"

    def __init__(self, recipe: ClassificationRecipe, data_dir: Path | None = None) -> None:
        self.recipe: ClassificationRecipe = recipe
        self.dataset = load_images(recipe.data, data_dir)
        self.corpus_sha256 = self.dataset.sha256
        self.train = self.dataset.train

    def describe(self) -> list[str]:
        data, config = self.dataset, self.recipe.training
        test = "" if data.test is None else f", {len(data.test):,} test images"
        return [
            f"{self.recipe.data.dataset}: {len(data.train):,} training images, {len(data.validation):,} validation"
            f" images{test}",
            f"{config.steps:,} steps of {config.batch_size} images",
        ]

    def check(self) -> None:
        model, pixels = self.recipe.model, self.dataset.train.inputs
        expected = (model.channels, model.image_size, model.image_size)
        if pixels.shape[1:] != expected or self.dataset.classes > model.classes:
            raise InputError(
                f"the images of {self.recipe.data.dataset} are {tuple(pixels.shape[1:])} of {self.dataset.classes} "
                f"classes; the recipe's model takes {expected} of {model.classes}"
            )

    def build_model(self) -> VisionTransformer:
        model = VisionTransformer(self.recipe.model)
        model.pixel_mean, model.pixel_deviation = channel_statistics(self.dataset.train.inputs)
        return model

    def to(self, device: torch.device) -> None:
        self.train = Examples(self.train.inputs.to(device), self.train.labels.to(device))

    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        device = self.train.labels.device
        chosen = torch.randint(len(self.train), (self.recipe.units_per_step,), generator=generator, device=device)
        return augmented(self.train.inputs[chosen], self.recipe.data.augment, generator), self.train.labels[chosen]

    def loss(self, network: Any, inputs: Tensor, targets: Tensor) -> Tensor:
        logits = network(inputs)
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets)

    def evaluate(self, model: VisionTransformer) -> list[ClassificationEvaluation]:
        return [self._measure(model, self.dataset.validation)]

    @torch.no_grad()
    def _measure(self, model: VisionTransformer, images: Examples) -> ClassificationEvaluation:
        device = model.head.weight.device
        was_training = model.training
        model.eval()
        total, right = 0.0, 0
        for pixels, labels in zip(
            images.inputs.split(EXAMPLES_PER_BATCH), images.labels.split(EXAMPLES_PER_BATCH), strict=True
        ):
            logits = model(pixels.to(device)).cpu().double()
            total += float(F.cross_entropy(logits, labels, reduction="sum"))
            right += int((logits.argmax(-1) == labels).sum())
        model.train(was_training)
        return ClassificationEvaluation("examples", len(images), total / len(images), right / len(images))

    def dynamics(self, model: VisionTransformer) -> dict[str, Any]:
        sample = self.dataset.validation.inputs[:LOCALITY_EXAMPLES].to(model.head.weight.device)
        found: dict[str, Any] = {"locality": measure_locality(attention_weights(model, sample))}
        sigmas = [part.sigma().tolist() for part in model.modules() if isinstance(part, GaussianAttention)]
        return found | ({"sigma": sigmas} if sigmas else {})

    def save_config(self, folder: Path, model: VisionTransformer) -> None:
        save_config(folder, model, None)

    def save_weights(self, folder: Path, model: VisionTransformer, about: dict[str, Any]) -> None:
        save_weights(folder, model, None, about)

    def final_measures(self, model: VisionTransformer) -> dict[str, Any]:
        """Loss and accuracy of every part, and what the class token holds of the patches of a few images."""
        parts = {"validation": self.dataset.validation, "test": self.dataset.test}
        measures = {name: [self._measure(model, part).to_json()] for name, part in parts.items() if part is not None}
        shown = self.dataset.validation.inputs[:SHOWN_EXAMPLES]
        rollout = attention_rollout(attention_weights(model, shown.to(model.head.weight.device)))
        return measures | {"class_token": {"images": shown.tolist(), "rollout": rollout[:, 0, 1:].tolist()}}

    def forward_flops(self, model: VisionTransformer) -> float:
        return self.recipe.units_per_step * count_image_flops(model)
