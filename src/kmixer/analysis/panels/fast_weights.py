"""Panels of fast weights: how far they move by layer, and what adapting is worth by position."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from kmixer.analysis.panels.drawing import ArmPanel, add_legend, begin_figure
from kmixer.experiments.arms import Arm

# Checked in whole where metrics are read, see `kmixer.runs.records`.
Measured = dict[str, Any]  # see `kmixer.measure.fast_weights`


def draw_moves(arm: Arm) -> Figure:
    """How far the weights of every layer have moved at the end of a window, over training; its time constant."""
    recorded = arm.recorded("fast_weights", Measured)
    learned = arm.recorded("fast_tau", list[Any])  # of the token form, a list per layer
    numbers = [(step, values) for step, values in learned if all(isinstance(value, float) for value in values)]
    figure, (left, *rest) = begin_figure(f"Fast weights of {arm.name}", "step", "", columns=1 + bool(numbers))
    left.set_ylabel("|F| / |W| at a window's end")
    layers = recorded[-1][1]["layers"]
    for index, layer in enumerate(layers):
        moves = [measured["moves"][index] for _, measured in recorded]
        left.plot([step for step, _ in recorded], moves, label=layer, linewidth=1.2)
    for axes in rest:
        axes.set(ylabel="time constant, tokens", yscale="log")
        for index in range(len(numbers[-1][1])):
            taus = [values[index] for _, values in numbers]
            axes.plot([step for step, _ in numbers], taus, label=layers[index % len(layers)], linewidth=1.2)
    add_legend(left)
    return figure


def draw_adapting(arm: Arm) -> Figure:
    """Loss by position with adapting and without, and their difference, at the last evaluation."""
    _, measured = arm.recorded("fast_weights", Measured)[-1]
    figure, (left, right) = begin_figure(f"Adapting of {arm.name}, last evaluation", "position, up to", "", columns=2)
    positions, loss, without = measured["positions"], measured["loss"], measured["loss_without"]
    for values, name, color in ((without, "not adapting", "C7"), (loss, "adapting", "C0")):
        left.plot(positions, values, marker="o", markersize=4, color=color, label=name, linewidth=1.2)
    worth = [before - after for before, after in zip(without, loss, strict=True)]
    right.axhline(0, color="0.6", linewidth=0.8)
    right.plot(positions, worth, marker="o", markersize=4, color="C0", linewidth=1.2)
    left.set_ylabel("nats per token")
    right.set_ylabel("worth, nats per token")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
    add_legend(left)
    return figure


FAST_WEIGHTS = ArmPanel(
    name="fast-weights",
    caption="First seed, validation windows: the norm of what a layer learned from a window, over that of the matrix "
    "it changes; and after how many tokens it has forgotten to 1 / e.",
    applies=lambda arm: len(arm.recorded("fast_weights", Measured)) >= 2,
    draw=draw_moves,
)
ADAPTING = ArmPanel(
    name="adapting",
    caption="First seed, validation windows: the same weights, adapting and not. The model was trained to adapt, so "
    "that the difference is not what one without fast weights would lose.",
    applies=lambda arm: bool(arm.recorded("fast_weights", Measured)),
    draw=draw_adapting,
)
