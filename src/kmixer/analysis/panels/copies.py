"""Panels of a copy memory: how far its gates are open, how often a copy is right, and what it is worth."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from kmixer.analysis.panels.drawing import ArmPanel, add_legend, begin_figure
from kmixer.experiments.arms import Arm

# Shapes are checked in whole where metrics are read, see `kmixer.runs.records`.
Gates = list[Any]  # a number for every layer, or a list by length of the match
Copies = dict[str, Any]  # see `kmixer.measure.copies`


def draw_copy_gates(arm: Arm) -> Figure:
    """The gate of every layer over training; by length of the match at its end too, where the gates know it."""
    recorded = [(step, np.array(gates)) for step, gates in arm.recorded("copy_gate", Gates)]
    copies = arm.recorded("copies", Copies)[-1][1]
    _, last = recorded[-1]
    by_length = last.ndim == 2
    figure, (left, *rest) = begin_figure(f"Copy gates of {arm.name}", "step", "gate", columns=1 + by_length)
    for index, layer in enumerate(copies["layers"]):
        name = f"layer {layer + 1}"
        means = [gates[index].mean() for _, gates in recorded]
        left.plot([step for step, _ in recorded], means, label=name, linewidth=1.2)
        for axes in rest:
            axes.plot(last[index], marker="o", markersize=3, label=name, linewidth=1.2)
    if by_length:
        left.set_ylabel("gate, mean over lengths")
    for axes in rest:
        axes.set_ylabel("gate, last evaluation")
        _name_lengths(axes, copies["lengths"])
    for axes in (left, *rest):
        axes.set_ylim(0, max(1e-3, 1.08 * max(gates.max() for _, gates in recorded)))
    add_legend(left)
    return figure


def draw_copies(arm: Arm) -> Figure:
    """By length of the match at the last evaluation: how often the copy comes next, and the loss with and without."""
    _, copies = arm.recorded("copies", Copies)[-1]
    lengths, counts = copies["lengths"], copies["positions"]
    figure, (left, right) = begin_figure(f"Copies of {arm.name}, last evaluation", "", "", columns=2)
    shares = np.array([np.nan if share is None else share for share in copies["right"]], dtype=float)
    left.set_axisbelow(True)
    bars = left.bar(range(len(lengths)), np.nan_to_num(shares), color="C0", width=0.75)
    labels = [f"{count:,}" if count else "" for count in counts]
    left.bar_label(
        bars, labels, rotation=90, padding=3, fontsize=8, color="0.35"
    )  # turned, as they are wider than bars
    left.set(ylabel="copy is the next token", ylim=(0, 1.25), yticks=np.linspace(0, 1, 6))
    left.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    for measure, name, color in (("loss_without", "told nothing", "C7"), ("loss", "with copies", "C0")):
        losses = [np.nan if loss is None else loss for loss in copies[measure]]
        right.plot(losses, marker="o", markersize=4, color=color, label=name, linewidth=1.2)
    right.set(ylabel="nats per token", ylim=(0, None))
    for axes in (left, right):
        _name_lengths(axes, lengths)
    add_legend(right)
    return figure


def _name_lengths(axes: Axes, lengths: list[str]) -> None:
    axes.set_xlabel("length of the match, tokens")
    axes.set_xticks(range(len(lengths)), lengths, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)


def _has_gates(arm: Arm) -> bool:
    recorded = arm.recorded("copy_gate", Gates)
    return len(recorded) >= 2 and len(recorded[-1][1]) > 0


COPY_GATES = ArmPanel(
    name="copy-gates",
    caption="First seed: what part of a copied token's vector a layer adds to what it mixes.",
    applies=_has_gates,
    draw=draw_copy_gates,
)
COPIES = ArmPanel(
    name="copies",
    caption="First seed, on validation windows: the number at a bar is how many positions have a match of that length. "
    "Told nothing: the same weights, with every position told that nothing was seen before.",
    applies=lambda arm: bool(arm.recorded("copies", Copies)),
    draw=draw_copies,
)
