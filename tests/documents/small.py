"""Small recipes for the commands of the documents: the same keys, less of everything.

`shrink()` bounds what a recipe asks for wherever one is parsed, in this process; `sitecustomize.py` beside the commands
of a page does the same in the processes that they start.
"""

from __future__ import annotations

from typing import Any

from kmixer.runs import recipe as recipes

STEPS, BATCH, WINDOW, EVALUATE, LAYERS, WIDTH = 6, 2, 64, 3, 2, 16
SITE = "from tests.documents.small import shrink\nshrink()\n"


def shrink() -> None:
    """Bound every recipe that is parsed from now on. Bounding twice changes nothing."""
    whole = recipes.parse_recipe

    def parse_small(values: dict[str, Any], source: str) -> Any:
        return whole(_bounded(values), source)

    recipes.parse_recipe = parse_small


def _bounded(values: dict[str, Any]) -> dict[str, Any]:
    values = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
    training, model, data = values["training"], values["model"], values["data"]
    for key, most in (("steps", STEPS), ("evaluate_every", EVALUATE), ("log_every", 1)):
        training[key] = min(training.get(key, most), most)
    training["batch_size"], training["accumulation"] = BATCH, 1
    training["warmup_steps"] = min(training.get("warmup_steps", 0), 1)
    model["layers"] = min(model["layers"], LAYERS)
    if values.get("task", "language") == "language":
        model["width"] = min(model["width"], WIDTH)
        if "heads" in model:
            model["heads"] = min(model["heads"], 2)
        training["window"] = min(training["window"], WINDOW)
        values["evaluation"] = {**values.get("evaluation", {}), "window": WINDOW}
        if data["corpus"] in ("plays", "tiny-shakespeare"):
            data |= {"corpus": "python-docs", "validation": 0.02}
            data.pop("test", None)
    elif data["dataset"] == "listops":
        data |= {"dataset": "listops-short", "examples": 64, "length": 32}
        model["length"] = min(model["length"], 33)
    return values
