"""Classification of images as a training task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kmixer.data.images import augmented, channel_statistics, load_images
from kmixer.errors import InputError
from kmixer.measure.locality import attention_rollout, attention_weights
from kmixer.models.classifiers import Classifier
from kmixer.models.vision import VisionTransformer
from kmixer.runs.recipe import ImageRecipe
from kmixer.training.classification import ClassificationTask

# Images whose class token is kept in results.json.
SHOWN_EXAMPLES = 6


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
        """A few images, and what the class token holds of each patch; nothing without one, or without weights."""
        if self.recipe.model.pooling != "class":
            return {}
        shown = self.dataset.validation.inputs[:SHOWN_EXAMPLES]
        weights = attention_weights(model, shown.to(model.head.weight.device))
        if len(weights) < self.recipe.model.layers:  # output fusion has none
            return {}
        rollout = attention_rollout(weights)[:, 0, 1:]
        return {"class_token": {"images": shown.tolist(), "rollout": rollout.tolist()}}
