"""Panel of overlap: how alike tokens become with depth, beside what is common to all text; the excess by position."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from kmixer.analysis.panels.drawing import add_legend, begin_figure, label_of
from kmixer.analysis.panels.lab import panel_of, title_of
from kmixer.measure.signal import INTERVAL
from kmixer.runs.lab import OverlapRecord

Values = np.ndarray[Any, Any]
STYLES = ("-", "--", ":")  # of groups of positions, the first ones first


def draw_overlap(record: OverlapRecord) -> Figure:
    """Overlap with its band, across sequences, theory, fresh weights; on the right the excess by group of positions."""
    with_groups = any(curve.groups for curve in record.curves)
    title = title_of("Overlap of tokens", record)
    figure, (left, *rest) = begin_figure(title, "after block", "mean cosine", columns=1 + with_groups)
    theory: str | None = "theory"  # named once
    for index, curve in enumerate(record.curves):
        color, layers, named = f"C{index}", np.arange(len(curve.overlap)), index == len(record.curves) - 1
        mean, error = np.array(curve.overlap), INTERVAL * np.array(curve.overlap_error)
        left.plot(layers, mean, label=label_of(curve.name), linewidth=1.3, color=color)
        left.fill_between(layers, mean - error, mean + error, alpha=0.2, color=color, linewidth=0)
        if curve.groups:
            across = "across sequences" if named else None
            left.plot(layers, curve.across, "--", label=across, linewidth=1.0, color=color, alpha=0.7)
        if curve.fresh is not None:
            _draw_fresh(left, layers, np.array(curve.fresh.overlap), color, "at initialisation" if named else None)
        if curve.theory is not None:
            left.plot(layers, curve.theory, ":", label=theory, linewidth=1.4, color="black", alpha=0.8)
            theory = None
        for axes in rest:
            for style, (group, values) in zip(STYLES, curve.groups.items(), strict=False):
                name = f"positions {group}" if named else None
                axes.plot(layers, values, style, label=name, linewidth=1.2, color=color)
            if curve.fresh is not None:
                excess = np.array(curve.fresh.overlap) - np.array(curve.fresh.across)
                _draw_fresh(axes, layers, excess, color, "all, at initialisation" if named else None)
    for axes in (left, *rest):
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    for axes in rest:
        axes.set_ylabel("excess over other sequences")
        axes.legend(frameon=False, fontsize=8)
    add_legend(left)
    return figure


def _draw_fresh(axes: Axes, layers: Values, values: Values, color: str, name: str | None) -> None:
    axes.plot(layers, values, "-.", label=name, linewidth=0.9, color=color, alpha=0.8)


OVERLAP = panel_of(
    OverlapRecord,
    draw_overlap,
    "mean cosine between tokens of a sequence, and between those of different ones, which is common to all text. It "
    "says nothing about loss.",
)
