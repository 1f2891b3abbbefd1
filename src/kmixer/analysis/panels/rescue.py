"""Figure of two ecologies: what models and counters tell apart, by the share of training texts that have brackets."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from kmixer.analysis.panels.drawing import begin_figure
from kmixer.runs.lab_ecology import RescueRecord

STYLES = (":", "--", "-.", (0, (5, 1)))  # of counters, the shortest first
WHAT = {"chunks": "chunks as they stand", "separated": "separated brackets"}


def draw_rescue(record: RescueRecord) -> Figure:
    """An axis for every kind of texts: mixers with a band from the lowest to the highest seed, counters in grey."""
    columns = len(record.evaluations)
    figure, all_axes = begin_figure(
        "Unbalanced brackets against balanced ones", "share of training texts with brackets", "", columns=columns
    )
    figure.set_size_inches(4.3 * columns, 4.3)
    all_axes[0].set_ylabel("loss of twin less that of text, nats per character", fontsize=8.5)
    for axes, evaluation in zip(all_axes, record.evaluations, strict=True):
        alphas = np.array(evaluation.alphas)
        axes.set_title(f"{WHAT.get(evaluation.name, evaluation.name)}, {evaluation.characters} characters", fontsize=9)
        axes.axhline(0, color="black", linewidth=0.6)
        for style, counter in zip(STYLES, evaluation.counters, strict=False):
            counted = [share.discrimination for share in counter.shares]
            name = f"counter, {counter.context} character{'s' * (counter.context > 1)}"
            axes.plot(alphas, counted, linestyle=style, color="0.45", linewidth=1.2, label=name)
        for index, curve in enumerate(evaluation.curves):
            values = np.array([share.discrimination for share in curve.shares])
            axes.plot(alphas, values.mean(1), "o-", color=f"C{index}", markersize=3.5, linewidth=1.5, label=curve.mixer)
            axes.fill_between(alphas, values.min(1), values.max(1), color=f"C{index}", alpha=0.25, linewidth=0)
        below: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.17), "ncols": 2}
        axes.legend(frameon=False, fontsize=8, **below)
    return figure
