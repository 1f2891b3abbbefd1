"""The names of a run's files, and of the hidden folders in which a run is made."""

from __future__ import annotations

from pathlib import Path

from kmixer.models.model_folder import CONFIG, TOKENIZER, WEIGHTS

RECIPE, METRICS, ENVIRONMENT, RESULTS, DIVERGED, CHECKPOINT = (
    "recipe.toml",
    "metrics.jsonl",
    "environment.json",
    "results.json",
    "diverged.json",
    "checkpoints/last.safetensors",
)
FILES = (RECIPE, CONFIG, TOKENIZER, WEIGHTS, METRICS, ENVIRONMENT, RESULTS, DIVERGED, CHECKPOINT)

# Inside a run folder: a run that has still to prove that it works, one that has, and one whose files are being moved.
STAGED, PROVEN, MOVING = ".kmixer-new", ".kmixer-ready", ".kmixer-moving"


def written_in_part(folder: Path) -> list[Path]:
    """What killed writes of a run's own files have left in a folder that holds them; see `atomic_write`."""
    return [path for name in FILES for path in (folder / name).parent.glob(f".{Path(name).name}.????????.tmp")]
