"""What a copy memory adds to the training and to the decoding of a model, on text, beside the same model without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kmixer.bench.measure import time_in_turn
from kmixer.bench.models import training_step
from kmixer.generation.decoder import open_decoder
from kmixer.generation.sampling import Sampling
from kmixer.models import CausalLM
from kmixer.runs.recipe import LanguageRecipe, load_language_recipe

RECIPE = "shakespeare-small-copy"
WITHOUT = "without copies"
MEMORIES = (65_536, 2_048)
BATCHES = (1, 64)


def bench_training(tokens: Tensor, repeats: int) -> list[dict[str, Any]]:
    """Training steps on the recipe's batch of windows of a text (n,)."""
    recipes = _recipes()
    config = recipes[WITHOUT].training
    batch = tokens[: config.batch_size * (config.window + 1)].view(config.batch_size, config.window + 1)
    calls = {name: training_step(_model(recipe), config, batch) for name, recipe in recipes.items()}
    return [
        {"section": "training", "what": name, "rows": config.batch_size, "t": config.window, **figures}
        for name, figures in _relative(calls, repeats, config.batch_size * config.window).items()
    ]


def bench_decoding(tokens: Tensor, prompt: int, steps: int, repeats: int) -> list[dict[str, Any]]:
    """Steps along a text (n,), every row at a stretch of its own: alone, and with a token drawn at temperature 1."""
    rows = []
    for batch in BATCHES:
        stretches = tokens[: len(tokens) // batch * batch].view(batch, -1)
        timed = stretches[:, prompt : prompt + steps * (repeats + 1)]
        for what, sampling in (("steps", None), ("steps and drawing", Sampling())):
            calls = {
                name: _stepper(_model(recipe), stretches[:, :prompt], timed, steps, sampling)
                for name, recipe in _recipes().items()
            }
            rows += [
                {"section": what, "what": name, "rows": batch, "t": steps, **figures}
                for name, figures in _relative(calls, repeats, batch * steps).items()
            ]
    return rows


def _recipes() -> dict[str, LanguageRecipe]:
    """The recipe without its copy memory, and with memories of several sizes."""
    settings = {WITHOUT: ["model.copy_memory="]}
    settings |= {f"memory {memory:,}": [f"model.copy_memory.memory={memory}"] for memory in MEMORIES}
    return {name: load_language_recipe(RECIPE, changes) for name, changes in settings.items()}


def _model(recipe: LanguageRecipe) -> CausalLM:
    torch.manual_seed(0)
    return CausalLM(recipe.model, recipe.tokenizer.vocabulary_size)


@torch.no_grad()
def _stepper(
    model: CausalLM, prompt: Tensor, rest: Tensor, steps: int, sampling: Sampling | None
) -> Callable[[], None]:
    """A call that takes the next steps along the text, from its beginning again where it ends."""
    decoder = open_decoder(model.eval(), model(prompt).state)
    columns = [column.contiguous() for column in rest.unbind(1)]
    generator, at = torch.Generator().manual_seed(0), 0

    def call() -> None:
        nonlocal at
        for _ in range(steps):
            logits = decoder.step(columns[at % len(columns)])
            at += 1
            if sampling is not None:
                sampling(logits, generator)

    return torch.no_grad()(call)


def _relative(calls: dict[str, Callable[[], None]], repeats: int, tokens: int) -> dict[str, dict[str, float]]:
    """Of every call its time, its rate of tokens, and its time beside that of the first."""
    timed = time_in_turn({**calls}, repeats)
    return {
        name: {
            "seconds": times["seconds"],
            "tokens_per_second": tokens / times["seconds"],
            "relative_to_without": times["relative"],
        }
        for name, times in timed.items()
    }
