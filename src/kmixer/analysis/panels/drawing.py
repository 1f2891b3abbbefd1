"""What every panel is made with: when it applies, its caption, its drawing; axes and legends."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kmixer.errors import one_line
from kmixer.experiments.arms import Arm

WIDTH, HEIGHT = 6.4, 3.6
# Of the many curves of a figure, the legend names as many as one can tell apart; more than a few stand below the axes.
LEGEND_LIMIT, LEGEND_INSIDE = 12, 5
LEGEND_COLUMNS, LEGEND_ROW_HEIGHT = 3, 0.2

Subject = TypeVar("Subject", Arm, list[Arm])


@dataclass(frozen=True)
class Panel(Generic[Subject]):
    """A figure of a report, of one arm or of all arms together."""

    name: str  # fit for a file
    caption: str  # what a reader should know about it
    applies: Callable[[Subject], bool]  # whether there is something to draw
    draw: Callable[[Subject], Figure]  # called only where it applies


# A figure of one arm after the other, or of all of them.
ArmPanel = Panel[Arm]
OverviewPanel = Panel[list[Arm]]


def label_of(name: str) -> str:
    """A name as a figure takes it: matplotlib reads $...$ as a formula, and has no glyph for a control sign."""
    return one_line(name).replace("$", r"\$")


def begin_figure(title: str, x: str, y: str, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure with its title, and its axes side by side, all labelled alike."""
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    all_axes = [figure.add_subplot(1, columns, i + 1) for i in range(columns)]
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    for axes in all_axes:
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, all_axes


def add_legend(axes: Axes) -> None:
    """A legend inside the axes, or below them where there are more than a few curves."""
    handles, labels = axes.get_legend_handles_labels()
    if 1 < len(handles) <= LEGEND_INSIDE:
        axes.legend(frameon=False, fontsize=8)
    elif LEGEND_INSIDE < len(handles) <= LEGEND_LIMIT:
        figure = axes.get_figure(root=True)
        assert figure is not None
        figure.set_figheight(HEIGHT + LEGEND_ROW_HEIGHT * math.ceil(len(handles) / LEGEND_COLUMNS))
        below: Literal["outside lower center"] = "outside lower center"
        figure.legend(handles, labels, loc=below, ncols=LEGEND_COLUMNS, frameon=False, fontsize=8)


def number_heads(axes: Axes, image: np.ndarray[Any, Any]) -> None:
    """An image of layers by heads, both numbered from 1 on."""
    axes.grid(visible=False)
    layers, heads = image.shape
    axes.set_yticks(range(layers), [str(layer + 1) for layer in range(layers)])
    axes.set_xticks(range(heads), [str(head + 1) for head in range(heads)])
