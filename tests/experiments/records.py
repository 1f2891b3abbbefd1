"""Run folders with chosen numbers, made without training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kmixer.files import write_json
from kmixer.runs.recipe import LanguageRecipe, load_recipe
from kmixer.runs.run_folder import ENVIRONMENT, RESULTS, RunFolder
from tests.conftest import tiny_recipe_values

ENVIRONMENT_VALUES = {
    "kmixer": "0.1.0",
    "commit": None,
    "python": "3.11",
    "packages": {"torch": "2"},
    "platform": "Linux",
    "device": "cpu",
    "threads": 1,
    "command": ["kmixer", "train"],
    "corpus_sha256": "0" * 64,
}


def evaluation(step: int, loss: float, **more: Any) -> dict[str, Any]:
    """A line of metrics.jsonl; `stretches` go into the measurement, the rest beside it."""
    measured = {"protocol": "windows", "window": 32, "loss": loss, "perplexity": None, "bits_per_byte": loss / 0.693}
    measured["stretches"] = more.pop("stretches", None)
    return {"step": step, "seconds": 60.0 * step, "validation": [measured], **more}


def results_of(seed: int, loss: float, **best: Any) -> dict[str, Any]:
    """What results.json holds of a run of 8 steps whose last weights are worse by 1 nat."""
    (chosen,), (last,) = evaluation(8, loss)["validation"], evaluation(8, loss + 1)["validation"]
    return {
        "recipe": "tiny",
        "seed": seed,
        "parameters": 1000,
        "steps": 8,
        "tokens": 1024,
        "flops": 1e9,
        "seconds": 120.0,
        "best": {"step": 8, "validation": [chosen], **best},
        "last": {"step": 8, "validation": [last]},
    }


def make_record(
    folder: Path, lines: list[dict[str, Any]], results: dict[str, Any] | None = None, recipe: str | None = None
) -> RunFolder:
    """A run of the tiny recipe, or of a packaged one, with these lines of metrics; ended where it has results."""
    run = RunFolder(folder)
    folder.mkdir(parents=True)
    run.write_recipe(
        LanguageRecipe.parse(tiny_recipe_values("any.txt"), source="test") if recipe is None else load_recipe(recipe)
    )
    write_json(folder / ENVIRONMENT, ENVIRONMENT_VALUES)
    for line in lines:
        run.append_metrics(line)
    if results is not None:
        write_json(folder / RESULTS, results)
    return run
