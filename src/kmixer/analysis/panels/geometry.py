"""Panel of geometry: how far perturbed text moves representations, beside untrained encoders and unrelated inputs."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kmixer.analysis.panels.drawing import HEIGHT, begin_figure, label_of
from kmixer.analysis.panels.lab import panel_of, title_of
from kmixer.measure.geometry import BAND
from kmixer.runs.lab_geometry import GeometryRecord


def draw_geometry(record: GeometryRecord) -> Figure:
    """D with its band, and D_k; columns are perturbations."""
    figure, (left, right) = begin_figure(title_of("Geometry", record), "perturbed", "", columns=2)
    figure.set_figheight(HEIGHT + 0.4)
    centres = np.arange(len(record.perturbations))
    for index, curve in enumerate(record.curves):
        color, offset = f"C{index}", 0.12 * (index - (len(record.curves) - 1) / 2)
        moves, x = curve.trained, centres + offset
        error = BAND * np.array(curve.distance_error)
        left.errorbar(x, moves.distance, error, fmt="o", markersize=4, color=color, label=label_of(curve.name))
        right.plot(x, moves.shared, "o", markersize=4, color=color)
        _draw_references(left, x, [one.distance for one in curve.untrained], moves.null, color, named=index == 0)
        _draw_references(right, x, [one.shared for one in curve.untrained], moves.shared_null, color, named=False)
    for axes, name in ((left, "D"), (right, f"D of the first {record.directions} directions")):
        axes.set(ylabel=name, ylim=(0, 1.03), xlim=(-0.5, len(centres) - 0.5))
        axes.set_xticks(centres, record.perturbations)
        axes.grid(visible=False, axis="x")
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


def _draw_references(
    axes: Axes,
    x: np.ndarray[Any, Any],
    untrained: list[list[float]],
    null: list[float],
    color: str,
    *,
    named: bool,
) -> None:
    """A cross for every fresh encoder, a bar for shuffled pairs."""
    for number, values in enumerate(untrained):
        name = "untrained" if named and number == 0 else None
        axes.plot(x, values, "x", markersize=5, color=color, alpha=0.5, label=name)
    axes.plot(x, null, "_", markersize=18, color="0.45", label="null: shuffled pairs" if named else None)


GEOMETRY = panel_of(
    GeometryRecord,
    draw_geometry,
    "how far perturbing the text moves the representations of its windows, 0 to 1: tokens replaced by draws from the "
    "training text, and windows read backwards where that was asked for. It is stability, and no quality.",
)
