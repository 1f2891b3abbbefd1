"""Classifiers by their configuration."""

from __future__ import annotations

from kmixer.models.sequence_classifier import SequenceClassifier, SequenceClassifierConfig, count_sequence_flops
from kmixer.models.vision import VisionConfig, VisionTransformer, count_image_flops

Classifier = VisionTransformer | SequenceClassifier
ClassifierConfig = VisionConfig | SequenceClassifierConfig


def build_classifier(config: ClassifierConfig) -> Classifier:
    """The classifier of a configuration, with fresh weights."""
    return VisionTransformer(config) if isinstance(config, VisionConfig) else SequenceClassifier(config)


def count_example_flops(model: Classifier, *, every_key: bool = False) -> float:
    """Operations of the forward pass of one example; of a sequence that fills all positions of the model.

    `every_key` counts every position against all; see `count_flops`. In images it sees all anyway.
    """
    if isinstance(model, VisionTransformer):
        return count_image_flops(model)
    return count_sequence_flops(model, model.config.length, every_key=every_key)
