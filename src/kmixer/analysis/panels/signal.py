"""Panel of growing gradients: log J(L, l) against both coordinates in which a law is a line, theory beside it."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullFormatter, NullLocator

from kmixer.analysis.panels.drawing import add_legend, begin_figure
from kmixer.analysis.panels.lab import panel_of, title_of
from kmixer.measure.signal import INTERVAL
from kmixer.runs.lab import SignalRecord

# Marks at l + 1 where the axis is not linear.
MARKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
DECADE = 10


def draw_signal(record: SignalRecord) -> Figure:
    """J(L, l) against l + 1, on a logarithmic axis and on one of square roots; q and cosine of the stream."""
    figure, (power, stretched, stream) = begin_figure(title_of("Growth of gradients", record), "", "", columns=3)
    theory: str | None = "theory"  # named once
    for index, curve in enumerate(record.curves):
        color = f"C{index}"
        depth = np.arange(1, len(curve.log_growth) + 1)
        log, error = np.array(curve.log_growth), INTERVAL * np.array(curve.log_growth_error)
        for axes in (power, stretched):
            axes.plot(depth, np.exp(log), label=curve.name, linewidth=1.3, color=color)
            axes.fill_between(depth, np.exp(log - error), np.exp(log + error), alpha=0.2, color=color, linewidth=0)
            if curve.log_theory is not None:
                axes.plot(depth, np.exp(curve.log_theory), "--", label=theory, linewidth=1.0, color="black", alpha=0.7)
        theory = theory if curve.log_theory is None else None
        stream.plot(depth - 1, curve.q, linewidth=1.3, color=color)
        stream.plot(depth - 1, np.clip(curve.cosine, 1e-3, None), linewidth=1.0, linestyle=":", color=color)
    longest = max(len(curve.log_growth) for curve in record.curves)
    power.set_xscale("log", base=2)
    stretched.set_xscale("function", functions=(np.sqrt, np.square))
    for axes, name in ((power, "l + 1, logarithmic"), (stretched, "l + 1, square root")):
        axes.set_xlabel(name)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        if (ends := axes.get_ylim())[1] < DECADE * ends[0]:  # no or one power of ten: marks between them are named
            axes.yaxis.set_minor_formatter("{x:g}")
        _mark(axes, longest)
    power.set_ylabel("J(L, l)")
    stream.set(xlabel="l", yscale="log", ylabel="q (line), cosine (dots)")
    stream.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    add_legend(power)
    return figure


def _mark(axes: Axes, longest: int) -> None:
    marks = [mark for mark in MARKS if mark <= longest]
    axes.xaxis.set_major_locator(FixedLocator(marks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xticks(marks, [str(mark) for mark in marks])


SIGNAL = panel_of(
    SignalRecord,
    draw_signal,
    "the mean squared singular value of the map from layer l to the top. Above 1 gradients grow on their way down. It "
    "says nothing about training.",
)
