"""Classification of token sequences as a training task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from kmixer.data.examples import Examples
from kmixer.data.sequences import load_sequences
from kmixer.errors import InputError
from kmixer.models.classifiers import Classifier
from kmixer.models.sequence_classifier import lengths_of
from kmixer.runs.recipe import SequenceRecipe
from kmixer.training.classification import ClassificationEvaluation, ClassificationTask

# Tokens of one forward pass of an evaluation, and of the look at all attention weights.
TOKENS_PER_BATCH, LOCALITY_TOKENS = 32768, 2048


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
