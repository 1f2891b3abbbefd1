"""What the commands of the lab share: options, what is measured, lists of numbers, what becomes of a result."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from kmixer.analysis.figure_files import write_figure
from kmixer.errors import InputError, shown
from kmixer.runs.lab import LabResult, save_measurement
from kmixer.runs.run_folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TARGET_HELP = "A run or model folder, as it was trained; a recipe, as it begins."

Save = Annotated[
    bool, typer.Option("--save", help="Of a run: keep it in the run's folder, where kmixer report draws it.")
]
MovedCorpus = Annotated[str | None, typer.Option("--corpus", help="Where a run's own data is now, if it was moved.")]

Value = TypeVar("Value", int, float)
Record = TypeVar("Record", bound=LabResult)


def is_recipe(target: str) -> bool:
    """Folders are runs; all other names are those of recipes, and where there is none of it the error lists them."""
    return not Path(target).is_dir()


def numbers(option: str, text: str | None, kind: Callable[[str], Value]) -> list[Value]:
    """The numbers of a list. Raises InputError for anything else, or below 0."""
    if text is None:
        return []
    try:
        values = [kind(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(0 < value < math.inf for value in values):
        raise InputError(f"{option}: got {shown(text)}; allowed: numbers above 0 with commas between them")
    return values


def tell(line: str) -> None:
    print(line, file=sys.stderr)


def check_recipe(*, save: bool, corpus: str | None) -> None:
    """Raises InputError for options that go with a run, where a recipe is measured."""
    if save or corpus is not None:
        raise InputError("--save and --corpus go with a run; a recipe has no folder, and its data is data.corpus")


def check_runs(targets: Sequence[str], of_recipe: Mapping[str, object], *, save: bool) -> None:
    """Raises InputError for options of a recipe, by name, where runs are measured, and where nothing can be kept."""
    if any(given for given in of_recipe.values()):
        *first, last = of_recipe
        raise InputError(f"{', '.join(first)} and {last} go with a recipe; a run is measured as it is")
    if save and len(targets) > 1:
        raise InputError(f"--save: got {len(targets)} runs; a run keeps what is measured of it alone: give one")
    if save and not RunFolder(Path(targets[0])).exists():
        raise InputError(f"--save: {targets[0]} is a model without its run, and keeps no measurements")


def deliver(
    measured: dict[str, Any],
    kind: type[Record],
    draw: Callable[[Record], Figure],
    show: Callable[[dict[str, Any]], None],
    *,
    figure: Path | None,
    save_in: Path | None,
    as_json: bool,
) -> None:
    """Draw a measurement, keep it in a run, and print it: as JSON, or by `show`."""
    if figure is not None:
        write_figure(draw(kind.parse(measured, source=str(figure))), figure)
    if save_in is not None:
        tell(f"saved: {save_measurement(RunFolder(save_in), kind.panel, measured)}")
    if as_json:
        print(json.dumps(measured))
        return
    show(measured)


def headline(measured: dict[str, Any], state: str | None = None) -> str:
    """A line on what was measured of a model's layers; `state` where its weights are neither a run's best nor fresh."""
    state = state or ("best weights" if measured["trained"] else "at initialisation")
    return f"{measured['name']}, {state}, sequences of {measured['positions']} positions"
