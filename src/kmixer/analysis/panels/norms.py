"""The panel of norms that are functions of every number alone: what they let through, over training."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from kmixer.analysis.panels.drawing import ArmPanel, add_legend, begin_figure
from kmixer.experiments.arms import Arm

Measured = dict[str, Any]  # see `kmixer.measure.norms`
LABELS = {"input": "rms of the input", "alpha": "alpha", "saturation": "share of |alpha x + shift| > 2"}


def draw_pointwise_norms(arm: Arm) -> Figure:
    """Strength of the input, alpha and saturation of every norm, over training."""
    recorded = arm.recorded("norms", Measured)
    names = recorded[-1][1]["names"]
    figure, columns = begin_figure(f"Norms of {arm.name}", "step", "", columns=len(LABELS))
    for axes, (key, label) in zip(columns, LABELS.items(), strict=True):
        for index, name in enumerate(names):
            values = [measured[key][index] for _, measured in recorded]
            color = mpl.colormaps["viridis"](index / max(1, len(names) - 1))
            # The last stands at the end of the stack; of the others the first and the middle one are named.
            label_of = name if index in (0, len(names) // 2, len(names) - 1) else None
            axes.plot([step for step, _ in recorded], values, label=label_of, linewidth=1.0, color=color)
        axes.set_ylabel(label)
    for axes in columns[:2]:
        axes.set_yscale("log")
    add_legend(columns[-1])
    return figure


POINTWISE_NORMS = ArmPanel(
    name="pointwise-norms",
    caption="First seed, from the first norm (dark) to the last (light): DyT and Derf see the scale of their input, "
    "which alpha has to follow; what is saturated passes hardly any gradient.",
    applies=lambda arm: len(arm.recorded("norms", Measured)) >= 2,
    draw=draw_pointwise_norms,
)
