"""kmixer task: denoising, and classification of sequences by several mixers side by side."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from kmixer.cli import experiments
from kmixer.cli.options import Cpu, DataDir, Json, Settings
from kmixer.data.denoising import Denoising
from kmixer.errors import InputError
from kmixer.experiments.denoise import Budget, Score, run_denoising
from kmixer.experiments.tables import DENOISE_HEAD, denoise_cells, text_table
from kmixer.models.mixers.registry import CARDS

app = typer.Typer(help="Tasks that set mixers side by side.", no_args_is_help=True)

# Recipes of sequence classification, and what the commands of their names say.
CLASSIFICATION = {
    "listops": "Evaluate nested lists of digits (ListOps, up to 512 tokens), generated here.",
    "scifar": "Classify CIFAR-10 images as sequences of 1,024 grey pixels; needs cifar10.npz in --data-dir.",
    "imdb": "Tell good reviews from bad by their first 1,024 bytes; needs the IMDB files in --data-dir.",
}


@app.command()
def denoise(
    seeds: Annotated[int, typer.Option(help="Seeds 0, 1, ... of every mixer.")] = 5,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 500,
    as_json: Json = False,
) -> None:
    """Restore corrupted motifs by one block of each mixer: K2, convolutions, softmax attention.

    Example: kmixer task denoise --seeds 5
    """
    if seeds < 1 or steps < 1:
        raise InputError(f"--seeds {seeds} --steps {steps}; allowed: 1 or more of each")

    def report(mixer: str, seed: int, best: Score) -> None:
        print(f"{mixer}, seed {seed}: loss {best.loss:.3f}, accuracy {best.accuracy:.3f}", file=sys.stderr)

    rows = run_denoising(list(range(seeds)), Denoising(), Budget(steps=steps), report)
    if as_json:
        print(json.dumps([row.model_dump() for row in rows], indent=2))
        return
    print(text_table(DENOISE_HEAD, [denoise_cells(row) for row in rows]))
    print(
        "On corrupted positions of 1,024 validation sequences; the lowest loss of each run's evaluations. "
        "Differences in loss are from the first row, paired by seed."
    )


def _classification(name: str, description: str) -> Callable[..., None]:
    """The command that sweeps a classification recipe over mixers."""

    def command(
        mixers: Annotated[str, typer.Option(help="Which mixers; the first is the baseline.")] = ",".join(CARDS),
        seeds: Annotated[str, typer.Option(help="How many seeds, or a list: 1,2,3.")] = "3",
        settings: Settings = None,
        out: Annotated[Path | None, typer.Option(help="Folder of the sweep; default runs/TASK-sweep.")] = None,
        workers: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 1,
        threads: Annotated[int | None, typer.Option(min=1, help="Threads of a run.")] = None,
        data_dir: DataDir = None,
        cpu: Cpu = False,
    ) -> None:
        grid = [f"model.mixers={mixers}"]
        experiments.sweep(name, seeds, grid, settings, out, workers, threads, data_dir=data_dir, cpu=cpu)

    command.__doc__ = (
        f"{description}\n\nA sweep of recipe {name}: the same command goes on where it was stopped; compare and report "
        f"read its folder.\n\nExample: kmixer task {name} --mixers {','.join(list(CARDS)[:2])} --seeds 3"
    )
    return command


for _name, _description in CLASSIFICATION.items():
    app.command(name=_name)(_classification(_name, _description))
