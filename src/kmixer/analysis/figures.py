"""The panels of a report in their order, and the figures of those that apply to some runs."""

from __future__ import annotations

from typing import NamedTuple

from matplotlib.figure import Figure

from kmixer.analysis.panels import (
    attention,
    copies,
    ecology,
    fast_weights,
    geometry,
    k2,
    levels,
    losses,
    norms,
    overlap,
    signal,
)
from kmixer.analysis.panels.drawing import ArmPanel, OverviewPanel, label_of
from kmixer.experiments.arms import Arm

# Of all arms together; then of one arm after the other. A new panel is its file and its line here.
OVERVIEWS: tuple[OverviewPanel, ...] = (
    losses.LOSS_CURVES,
    losses.FINAL_LOSSES,
    losses.LOSS_BY_POSITION,
    k2.REFINEMENT,
)
PANELS: tuple[ArmPanel, ...] = (
    k2.BASE_SHARES,
    k2.DECAYS,
    k2.BASE_KERNELS,
    k2.BASE_KERNEL_MATRIX,
    losses.POSITIONS_OVER_TRAINING,
    attention.BANDWIDTHS,
    attention.LOCALITY,
    attention.COLUMNS,
    levels.LEVEL_WEIGHTS,
    levels.LEVEL_APPROXIMATION,
    copies.COPY_GATES,
    copies.COPIES,
    fast_weights.FAST_WEIGHTS,
    fast_weights.ADAPTING,
    norms.POINTWISE_NORMS,
    attention.CLASS_TOKEN,
    losses.NORMS,
    signal.SIGNAL,
    overlap.OVERLAP,
    geometry.GEOMETRY,
    ecology.ECOLOGY,
)


class Drawn(NamedTuple):
    """A figure of a report."""

    name: str  # fit for a file
    caption: str
    figure: Figure


def all_figures(arms: list[Arm]) -> list[Drawn]:
    """Every figure that these arms, all with a run that has begun, have something for."""
    arms = [Arm(label_of(arm.name), arm.runs) for arm in arms]
    drawn = [Drawn(panel.name, panel.caption, panel.draw(arms)) for panel in OVERVIEWS if panel.applies(arms)]
    for arm in arms:
        suffix = "" if len(arms) == 1 else f"-{_slug(arm.name)}"
        drawn += [Drawn(panel.name + suffix, panel.caption, panel.draw(arm)) for panel in PANELS if panel.applies(arm)]
    return drawn


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() or c in "=.-" else "-" for c in name)
