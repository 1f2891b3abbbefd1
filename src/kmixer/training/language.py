"""Language models as a training task: random windows of text, cross-entropy of the next token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kmixer.data.batches import random_windows
from kmixer.data.token_files import Dataset, count_tokens, prepare_dataset
from kmixer.data.tokenizers import Tokenizer
from kmixer.errors import InputError
from kmixer.layers.adapting import forgets
from kmixer.measure.dynamics import first_windows, measure_dynamics
from kmixer.measure.evaluation import Evaluation, evaluate, loss_by_position
from kmixer.models.causal_lm import CausalLM
from kmixer.models.flops import count_flops
from kmixer.models.heads import AdaptiveHead
from kmixer.models.model_folder import save_config, save_weights
from kmixer.runs.recipe import LanguageRecipe, Protocol
from kmixer.training.task import Task

# Every model is measured at these windows too, where it and the text reach so far.
COMMON_WINDOWS = (256, 1024)


class LanguageTask(Task):
    """A language-model recipe with its corpus and tokenizer.

    Args:
        recipe: the recipe.
        tokenizer: of the model that training goes on with; None builds one from the corpus.
        data_dir: where corpora are looked for first.
    """

    unit = "tokens"

    def __init__(
        self, recipe: LanguageRecipe, data_dir: Path | None = None, tokenizer: Tokenizer | None = None
    ) -> None:
        self.dataset: Dataset = prepare_dataset(recipe.data, tokenizer or recipe.tokenizer, data_dir)
        self.recipe: LanguageRecipe = _with_vocabulary(recipe.with_whole_path(), self.dataset.tokenizer.vocabulary_size)
        self.corpus_sha256 = self.dataset.sha256
        self.tokens = self.dataset.train.tokens
        self.sample = first_windows(self.dataset.validation.tokens, self.recipe.evaluation_window)

    def describe(self) -> list[str]:
        recipe, config, dataset = self.recipe, self.recipe.training, self.dataset
        return [
            f"{recipe.data.corpus}: {len(dataset.train.tokens):,} training tokens, "
            f"{len(dataset.validation.tokens):,} validation tokens, vocabulary {recipe.tokenizer.vocabulary_size}",
            *dataset.notes,
            f"{config.steps:,} steps of {config.batch_size} x {config.window} tokens",
        ]

    def check(self) -> None:
        config, recipe = self.recipe.training, self.recipe
        for part, split, window in (
            ("training", self.dataset.train, config.window),
            ("validation", self.dataset.validation, recipe.evaluation_window),
            ("test", self.dataset.test, recipe.evaluation_window),
        ):
            if split is not None and len(split.tokens) <= window:
                raise InputError(
                    f"the {part} part of corpus {recipe.data.corpus} has {len(split.tokens)} tokens; "
                    f"a window of {window} needs {window + 1} or more: give more text or a shorter window"
                )

    def build_model(self) -> CausalLM:
        model = CausalLM(self.recipe.model, self.recipe.tokenizer.vocabulary_size)
        if isinstance(model.head, AdaptiveHead):
            model.head.set_frequencies(count_tokens(self.dataset.train, model.vocabulary_size))
        return model

    def to(self, device: torch.device) -> None:
        self.tokens = self.tokens.to(device)

    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        config = self.recipe.training
        return random_windows(self.tokens, config.window, config.batch_size, generator)

    def loss(self, network: Any, inputs: Tensor, targets: Tensor) -> Tensor:
        losses: Tensor = network(inputs, targets=targets).losses
        return losses.mean()

    def evaluate(self, model: CausalLM) -> list[Evaluation]:
        recipe = self.recipe
        return [
            evaluate(model, self.dataset.validation, protocol, recipe.evaluation_window)
            for protocol in recipe.evaluation.protocols
        ]

    def dynamics(self, model: CausalLM) -> dict[str, Any]:
        return measure_dynamics(model, self.sample)

    def save_config(self, folder: Path, model: CausalLM) -> None:
        save_config(folder, model, self.dataset.tokenizer)

    def save_weights(self, folder: Path, model: CausalLM, about: dict[str, Any]) -> None:
        save_weights(folder, model, self.dataset.tokenizer, about)

    def final_measures(self, model: CausalLM) -> dict[str, Any]:
        """Evaluations of every part: the recipe's protocols first, then the common windows, then as one stream.

        There is no stream where its state would grow with the text, as its time goes with the square of the length; nor
        for fast weights that never forget.
        """
        recipe, dataset = self.recipe, self.dataset
        parts = {"validation": dataset.validation, "test": dataset.test if recipe.evaluation.test else None}
        measured: dict[str, Any] = {}
        for name, split in parts.items():
            if split is None:
                continue
            limit = min(model.config.max_positions or len(split.tokens), len(split.tokens) - 1)
            windows = [window for window in COMMON_WINDOWS if window <= limit]
            measures: dict[tuple[Protocol, int | None], None] = {}
            for protocol in recipe.evaluation.protocols:
                measures[protocol, recipe.evaluation_window if protocol == "windows" else None] = None
            measures |= {("windows", window): None for window in windows}
            if model.config.max_positions is None and not model.config.state_grows and forgets(model):
                measures["stream", None] = None
            measured[name] = [evaluate(model, split, protocol, window or 0).to_json() for protocol, window in measures]
        measured["loss_by_position"] = loss_by_position(model, dataset.validation, recipe.evaluation_window)
        return measured

    def forward_flops(self, model: CausalLM) -> float:
        return self.recipe.units_per_step * count_flops(model, self.recipe.training.window)


def _with_vocabulary(recipe: LanguageRecipe, size: int) -> LanguageRecipe:
    tokenizer = recipe.tokenizer.model_copy(update={"vocabulary_size": size})
    return LanguageRecipe.parse(
        recipe.model_copy(update={"tokenizer": tokenizer}).model_dump(), source=f"recipe {recipe.name}"
    )
