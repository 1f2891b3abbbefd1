"""Figures as files: which kinds there are, and the same bytes every time."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import TYPE_CHECKING

from kmixer.errors import InputError
from kmixer.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".svg", ".png")
PIXELS_PER_INCH = 200


def check_figure(path: Path | None) -> None:
    """Raises InputError for a file of another kind, before anything is measured for it."""
    if path is not None and path.suffix not in FORMATS:
        raise InputError(f"--figure: got {path}; allowed: a file that ends in {' or '.join(FORMATS)}")


def write_figure(figure: Figure, path: Path) -> None:
    """Write it, as SVG or PNG by the path's ending."""
    with atomic_write(path) as file, _steady_svg():
        dates = {"Date": None} if path.suffix == ".svg" else {}
        figure.savefig(file, format=path.suffix[1:], dpi=PIXELS_PER_INCH, metadata=dates)


def svg_element(figure: Figure) -> str:
    """The figure for a page: no background, and no header of its own."""
    buffer = io.StringIO()
    with _steady_svg():
        figure.savefig(buffer, format="svg", transparent=True)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _steady_svg() -> contextlib.AbstractContextManager[None]:
    """Text stays text, and names inside the file do not change from one writing to the next."""
    import matplotlib as mpl

    return mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "kmixer"})
