"""Figure of the ablation of heads: D by arm, against rank, and where there are several, by the number of codes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator

from kmixer.analysis.panels.drawing import HEIGHT, WIDTH, begin_figure
from kmixer.runs.lab_geometry import AblationRecord, HeadArm

NAMES = {"ce": "cross-entropy (ce)", "mse": "squared error (mse)"}
COLORS = {"ce": "C0", "mse": "C1"}
MARKERS = "osD^vP"
COLUMN = 4.2  # inches
D_MARKS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
RANK_MARKS = (1, 2, 4, 8, 16, 32, 64, 128)


def draw_heads(record: AblationRecord) -> Figure:
    """At the middle one of the rates of noise."""
    rate = len(record.rates) // 2
    sweep = len({arm.codes for arm in record.arms}) > 1
    title = (
        f"Noise at {100 * record.rates[rate]:g} % of the positions, {record.positions} positions, "
        f"seeds {', '.join(str(seed) for seed in sorted({arm.seed for arm in record.arms}))}"
    )
    y = "D (logarithmic)"
    figure, (by_arm, by_rank, *rest) = begin_figure(title, "", y, columns=2 + sweep)
    figure.set_size_inches(max(WIDTH, COLUMN * (2 + sweep)), HEIGHT + 0.7)
    encoders = list(dict.fromkeys((arm.system, arm.mixer) for arm in record.arms))
    _draw_by_arm(by_arm, record.arms, encoders, rate)
    by_arm.set_title("by encoder and head" + ", all codebooks" * sweep, fontsize=9)
    _draw_by_rank(by_rank, record.arms, encoders, rate)
    for axes in rest:
        _draw_by_codes(axes, record.arms, encoders, rate)
    for axes in (by_arm, by_rank, *rest):
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        _mark(axes.yaxis, [mark for mark in D_MARKS if low <= mark <= high])
    handles, labels = by_arm.get_legend_handles_labels()
    below = dict(zip(labels, handles, strict=True))
    for axes in (by_rank, *rest):
        below |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    columns = math.ceil(len(below) / 2)
    figure.legend([*below.values()], [*below], loc="outside lower center", ncols=columns, frameon=False, fontsize=8)
    return figure


def _mark(axis: Axis, marks: Sequence[float]) -> None:
    """These numbers alone along an axis, as they are, on a logarithmic scale too."""
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())
    axis.set_ticks(marks, [f"{mark:g}" for mark in marks])


def _draw_by_arm(axes: Axes, arms: list[HeadArm], encoders: list[tuple[str, str]], rate: int) -> None:
    """A column for every encoder, in it a point for every seed, and bars for what there is to compare with."""
    for arm in arms:
        x = encoders.index((arm.system, arm.mixer))
        if arm.head == arms[0].head:
            axes.plot(x - 0.3, arm.untrained.distance[rate], "x", color="0.45", markersize=5, label="untrained")
            axes.plot(x, arm.trained.null[rate], "_", color="0.45", markersize=22, label="null: shuffled pairs")
        offset = 0.0 if arm.head == arms[0].head else 0.3
        axes.plot(
            x + offset,
            arm.trained.distance[rate],
            "o",
            markersize=5,
            alpha=0.8,
            label=NAMES[arm.head],
            color=COLORS[arm.head],
        )
    axes.set_xticks(range(len(encoders)), ["\n".join(names) for names in encoders], fontsize=8)
    axes.grid(visible=False, axis="x")
    axes.set_xlim(-0.6, len(encoders) - 0.4)


def _draw_by_rank(axes: Axes, arms: list[HeadArm], encoders: list[tuple[str, str]], rate: int) -> None:
    """A point for every trained encoder."""
    for arm in arms:
        index = encoders.index((arm.system, arm.mixer))
        marker = MARKERS[index % len(MARKERS)]
        axes.plot(arm.trained.rank, arm.trained.distance[rate], marker, color=COLORS[arm.head], markersize=5, alpha=0.8)
    for index, names in enumerate(encoders):
        axes.plot([], [], MARKERS[index % len(MARKERS)], color="0.3", markersize=5, label=", ".join(names))
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    _mark(axes.xaxis, [mark for mark in RANK_MARKS if low <= mark <= high])
    axes.set(xlabel="rank (directions that carry the variance)", title="against rank: all trained encoders")
    axes.title.set_fontsize(9)


def _draw_by_codes(axes: Axes, arms: list[HeadArm], encoders: list[tuple[str, str]], rate: int) -> None:
    """D of both heads and before training, and the error of the codebook, by the number of codes; means over seeds."""
    codes = sorted({arm.codes for arm in arms})

    def means(chosen: list[HeadArm], value: str) -> list[float]:
        values = {
            "trained": lambda arm: arm.trained.distance[rate],
            "untrained": lambda arm: arm.untrained.distance[rate],
            "coding": lambda arm: arm.coding,
        }[value]
        return [statistics.fmean(values(arm) for arm in chosen if arm.codes == number) for number in codes]

    for index, names in enumerate(encoders):
        of_encoder = [arm for arm in arms if (arm.system, arm.mixer) == names]
        marker = MARKERS[index % len(MARKERS)]
        for head in dict.fromkeys(arm.head for arm in of_encoder):
            chosen = [arm for arm in of_encoder if arm.head == head]
            axes.plot(codes, means(chosen, "trained"), "-" + marker, color=COLORS[head], markersize=4, linewidth=1.2)
        axes.plot(codes, means(of_encoder, "untrained"), "-" + marker, color="0.6", markersize=4, linewidth=1.0)
        axes.plot(codes, means(of_encoder, "coding"), "--", color="0.3", linewidth=1.0, label="error of the codes")
    axes.set_xscale("log")
    _mark(axes.xaxis, codes)
    axes.set(xlabel="codes", ylabel="D, error of the codes", title="against the number of codes (grey: untrained)")
    axes.title.set_fontsize(9)
