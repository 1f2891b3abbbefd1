"""Figures of an evaluation: loss by position, and along a stream what was lost and how far fast weights moved."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from kmixer.analysis.panels.drawing import add_legend, begin_figure, label_of
from kmixer.measure.evaluation import stretch_edges
from kmixer.measure.fast_weights import Moves


def draw_positions(what: str, stretches: list[float], longest: int) -> Figure:
    """Loss by stretches of positions that double in length, the last of which ends at `longest`."""
    figure, (axes,) = begin_figure(label_of(what), "position, up to", "nats per token")
    axes.plot(stretch_edges(longest)[1:], stretches, marker="o", markersize=4, linewidth=1.2)
    axes.set_xscale("log", base=2)
    return figure


def draw_stream(what: str, tenths: list[float], tokens: int, moves: Moves | None) -> Figure:
    """Loss of every tenth of a stream of so many tokens, and |F| / |W| along it where there are fast weights."""
    moved = moves is not None and bool(moves.points)
    figure, all_axes = begin_figure(label_of(what), "tokens read", "nats per token", columns=1 + moved)
    for axes in all_axes:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    all_axes[0].stairs(tenths, [tokens * tenth / 10 for tenth in range(11)], linewidth=1.2, baseline=None)
    if moves is not None and moved:
        read = [count for count, _ in moves.points]
        for index, layer in enumerate(moves.layers):
            all_axes[1].plot(read, [move[index] for _, move in moves.points], label=layer, linewidth=1.2)
        all_axes[1].set(ylabel="|F| / |W|", ylim=(0, None))
        add_legend(all_axes[1])
    return figure
