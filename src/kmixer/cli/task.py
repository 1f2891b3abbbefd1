"""kmixer task: synthetic tasks that take minutes."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from kmixer.cli.options import Json
from kmixer.data.denoising import Denoising
from kmixer.errors import InputError
from kmixer.experiments.denoise import Budget, run_denoising
from kmixer.experiments.tables import with_deviation

app = typer.Typer(help="Synthetic tasks.", no_args_is_help=True)


@app.callback()
def _tasks() -> None:
    """Synthetic tasks."""


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

    def report(mixer: str, seed: int, best: dict[str, float]) -> None:
        print(f"{mixer}, seed {seed}: loss {best['loss']:.3f}, accuracy {best['accuracy']:.3f}", file=sys.stderr)

    rows = run_denoising(list(range(seeds)), Denoising(), Budget(steps=steps), report)
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    print(f"{'mixer':24}{'parameters':>11}{'n':>4}{'loss, nats':>20}{'accuracy':>20}")
    for row in rows:
        loss, accuracy = (with_deviation(row[key], row[f"{key}_deviation"], 3) for key in ("loss", "accuracy"))
        print(f"{row['mixer']:24}{row['parameters']:>11,}{row['n']:>4}{loss:>20}{accuracy:>20}")
    print("On corrupted positions of 1,024 validation sequences; the lowest loss of each run's evaluations.")
