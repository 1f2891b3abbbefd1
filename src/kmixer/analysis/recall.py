"""The figure of the recall task: accuracy against how far back a value was shown."""

from __future__ import annotations

from matplotlib.figure import Figure

from kmixer.analysis.panels.drawing import add_legend, begin_figure
from kmixer.experiments.rows import RecallingArm


def draw_recall(rows: list[RecallingArm], reach: int) -> Figure:
    """Accuracy by distance, axes for every number of pairs and a curve per arm.

    Args:
        rows: of `run_recall`.
        reach: how far back layers with a window see; a line stands there.
    """
    numbers = list(dict.fromkeys(row.pairs for row in rows))
    figure, all_axes = begin_figure("Values recalled", "positions since the value was shown", "", columns=len(numbers))
    for axes, pairs in zip(all_axes, numbers, strict=True):
        chosen = [row for row in rows if row.pairs == pairs]
        for index, row in enumerate(chosen):
            points = sorted(((at.nearest + at.farthest) / 2, at.accuracy) for at in row.by_distance)
            axes.plot(
                *zip(*points, strict=True), marker="o", markersize=3, linewidth=1.2, label=row.arm, color=f"C{index}"
            )
        axes.axhline(chosen[0].chance, color="0.6", linewidth=0.8, linestyle=":")
        axes.axvline(reach, color="0.6", linewidth=0.8)
        axes.set(ylim=(-0.03, 1.03), title=f"{pairs} pairs, {chosen[0].keys} keys", ylabel="accuracy")
        axes.title.set_fontsize(9)
    add_legend(all_axes[0])
    return figure
