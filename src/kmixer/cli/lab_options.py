"""What the commands of the lab share: names of recipes and runs, lists of numbers, figures."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from kmixer.errors import InputError, shown
from kmixer.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".svg", ".png")

Value = TypeVar("Value", int, float)


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


def check_figure(figure: Path | None) -> None:
    """Raises InputError for a file of another kind."""
    if figure is not None and figure.suffix not in FORMATS:
        raise InputError(f"--figure: got {figure}; allowed: a file that ends in {' or '.join(FORMATS)}")


def save_figure(draw: Callable[[], Figure], figure: Path) -> None:
    """Write what is drawn, text as text and the same bytes every time."""
    import matplotlib as mpl

    drawn = draw()
    with atomic_write(figure) as file, mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "kmixer"}):
        dates = {"Date": None} if figure.suffix == ".svg" else {}
        drawn.savefig(file, format=figure.suffix[1:], dpi=200, metadata=dates)
