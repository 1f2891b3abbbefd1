"""kmixer task: denoising, recall, and classification of sequences by several mixers side by side."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer

from kmixer.analysis.figure_files import check_figure, write_figure
from kmixer.cli import experiments
from kmixer.cli.options import Cpu, DataDir, FigureFile, Json, Settings
from kmixer.data.denoising import Denoising
from kmixer.data.recall import usual_task
from kmixer.errors import InputError, check_choice, shown
from kmixer.experiments.denoise import Budget, Score, run_denoising
from kmixer.experiments.recall import Setting, arms_of, run_recall
from kmixer.experiments.rows import TrainedRecall
from kmixer.experiments.tables import DENOISE_HEAD, RECALL_HEAD, denoise_cells, recall_cells, text_table
from kmixer.models.mixers.registry import CAUSAL_NAMES

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


@app.command()
def recall(
    mixers: Annotated[str, typer.Option(help="Which mixers; full attention is added.")] = "softmax,k2",
    fast_weights: Annotated[
        bool, typer.Option("--fast-weights/--no-fast-weights", help="Every mixer with fast weights too.")
    ] = True,
    pairs: Annotated[str, typer.Option(help="How many pairs, a list.")] = "8",
    seeds: Annotated[int, typer.Option(min=1, help="Seeds 0, 1, ... of every arm.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = Setting.steps,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences of a step.")] = Setting.batch_size,
    rate: Annotated[float, typer.Option(help="Of fast weights, of the write of a token.")] = Setting.rate,
    init: Annotated[Literal["next", "zero"], typer.Option(help="How fast weights begin.")] = "next",
    gaps: Annotated[str, typer.Option(help="Measure with so much filler too, a list; training has 64.")] = "",
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Keep every training that has ended here; the same command goes on."),
    ] = None,
    figure: FigureFile = None,
    as_json: Json = False,
) -> None:
    """Recall values by their keys from beyond the window: every mixer with fast weights and without.

    Example: kmixer task recall --mixers softmax,k2 --fast-weights --pairs 8,64 --seeds 3
    """
    from kmixer.analysis.recall import draw_recall

    check_figure(figure)
    for name in (names := mixers.split(",")):
        check_choice("--mixers", name, CAUSAL_NAMES)
    tasks = [usual_task(number) for number in _numbers("--pairs", pairs)]
    setting = Setting(
        steps=steps, batch_size=batch_size, rate=rate, init=init, gaps=tuple(_numbers("--gaps", gaps)) if gaps else ()
    )

    def report(one: TrainedRecall) -> None:
        print(f"{one.pairs} pairs, {one.arm}, seed {one.seed}: accuracy {one.accuracy:.4f}", file=sys.stderr)

    rows = run_recall(arms_of(names, fast=fast_weights), tasks, list(range(seeds)), setting, report, out)
    if figure is not None:
        write_figure(draw_recall(rows, setting.reach), figure)
    if as_json:
        print(json.dumps([row.model_dump() for row in rows], indent=2))
        return
    print(text_table(RECALL_HEAD, [recall_cells(row) for row in rows]))
    print(
        f"After {steps:,} steps of {batch_size} sequences, on {setting.validation:,} others; chance is 1 in as many as "
        f"there are keys. Layers with a window see {setting.reach} positions back together, the nearest value lies 65. "
        "Differences in accuracy are from the same mixer without fast weights, paired by seed."
    )


def _numbers(option: str, text: str) -> list[int]:
    """A list of numbers. Raises InputError for anything else."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and len(part) < 7 for part in parts):
        raise InputError(f"{option}: got {shown(text)}; allowed: whole numbers, such as 8,64")
    return list(dict.fromkeys(int(part) for part in parts))


def _classification(name: str, description: str) -> Callable[..., None]:
    """The command that sweeps a classification recipe over mixers."""

    def command(
        mixers: Annotated[str, typer.Option(help="Which mixers; the first is the baseline.")] = ",".join(CAUSAL_NAMES),
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
        f"read its folder.\n\nExample: kmixer task {name} --mixers {','.join(CAUSAL_NAMES[:2])} --seeds 3"
    )
    return command


for _name, _description in CLASSIFICATION.items():
    app.command(name=_name)(_classification(_name, _description))
