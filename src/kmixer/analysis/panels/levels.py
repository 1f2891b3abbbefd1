"""Panels of hierarchical attention: what each level weighs, and how the first levels stand to all of them."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from kmixer.analysis.panels.drawing import ArmPanel, add_legend, begin_figure
from kmixer.experiments.arms import Arm

Weights = list[list[list[float]]]  # of the levels in each head of each layer
Levels = list[dict[str, list[list[float]]]]  # by measure, one list per level, of each layer


def draw_level_weights(arm: Arm) -> Figure:
    """Weight of every level over training, mean over heads, and the symmetric part of its scores at the end."""
    recorded = arm.recorded("level_weights", Weights)
    _, levels = arm.recorded("levels", Levels)[-1]
    figure, (left, right) = begin_figure(f"Levels of {arm.name}", "", "", columns=2)
    steps = [step for step, _ in recorded]
    weights = np.array([layers for _, layers in recorded]).mean(2)  # (steps, layers, levels)
    for layer in range(weights.shape[1]):
        for level in range(weights.shape[2]):
            label = f"layer {layer + 1}, level {level}"
            left.plot(steps, weights[:, layer, level], color=f"C{layer % 10}", alpha=1 / (1 + 0.7 * level), label=label)
        shares = [np.mean(heads) for heads in levels[layer]["reciprocity"]]
        right.plot(range(len(shares)), shares, marker="o", markersize=4, label=f"layer {layer + 1}")
    left.set(xlabel="step", ylabel="weight, mean over heads", ylim=(0, None))
    right.set(xlabel="level", ylabel="symmetric part of the scores", ylim=(0, 1))
    right.set_xticks(range(weights.shape[2]))
    add_legend(left)
    return figure


def draw_level_approximation(arm: Arm) -> Figure:
    """How far the scores of the first levels are from full attention, and from those of all levels, at the end."""
    _, layers = arm.recorded("levels", Levels)[-1]
    figure, both = begin_figure(f"Scores of the first levels of {arm.name}", "levels", "", columns=2)
    names = {"fit_error": "relative distance from full attention", "remainder": "relative part that later levels add"}
    for axes, (measure, name) in zip(both, names.items(), strict=True):
        for layer, levels in enumerate(layers):
            means = [np.mean(heads) for heads in levels[measure] if heads]
            axes.plot(range(1, len(means) + 1), means, marker="o", markersize=4, label=f"layer {layer + 1}")
        axes.set_ylabel(name)
        axes.set_xticks(range(1, len(layers[0][measure]) + 1))
        axes.set_ylim(bottom=0)
    add_legend(both[1])
    return figure


def _has_several_levels(arm: Arm) -> bool:
    recorded = arm.recorded("levels", Levels)
    return bool(recorded) and len(recorded[-1][1][0]["remainder"]) >= 2


LEVEL_WEIGHTS = ArmPanel(
    name="levels",
    caption="Hierarchical attention, first seed: how much each level weighs, and how much of its scores' energy is "
    "symmetric; the rest is directional.",
    applies=lambda arm: len(arm.recorded("level_weights", Weights)) >= 2,
    draw=draw_level_weights,
)
LEVEL_APPROXIMATION = ArmPanel(
    name="level-approximation",
    caption="Hierarchical attention, first seed, mean over heads, Frobenius norms of unmasked scores; "
    "the nearest full attention is fitted on the features the layer sees.",
    applies=_has_several_levels,
    draw=draw_level_approximation,
)
