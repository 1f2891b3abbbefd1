"""Panels of K-Operators: decays, base kernels and what they weigh, refinement."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from kmixer.analysis.panels.drawing import ArmPanel, OverviewPanel, add_legend, begin_figure
from kmixer.experiments.arms import Arm
from kmixer.language_model import load
from kmixer.layers import BaseKernel
from kmixer.runs.recipe import LanguageRecipe

# A decay of 1 has no window; float32 knows no decay nearer to it than this.
LEAST = 1e-7


def draw_base_shares(arm: Arm) -> Figure:
    """Measured share of the base kernel, and its gate, in each layer over training."""
    figure, both = begin_figure(f"Base kernel in {arm.name}: a line per layer", "step", "", columns=2)
    for axes, measure, name in zip(both, ("base_share", "gate"), ("share of the mixed output", "gate"), strict=True):
        recorded = arm.recorded(measure, list[float])
        for layer, values in enumerate(zip(*(layers for _, layers in recorded), strict=True)):
            axes.plot([step for step, _ in recorded], values, label=f"layer {layer + 1}", linewidth=1.2)
        axes.set_ylabel(name)
        axes.set_ylim(0, 1)
    add_legend(both[0])
    return figure


def draw_decays(arm: Arm) -> Figure:
    """Effective window 1 / (1 - decay) of every channel, at the start and at the end of training."""
    recorded = arm.recorded("decay", list[list[float]])
    figure, (axes,) = begin_figure(f"Decays of {arm.name}", "K2 layer", "effective window 1 / (1 - decay), positions")
    for (step, layers), offset, color in ((recorded[0], -0.15, "C7"), (recorded[-1], 0.15, "C0")):
        for layer, decays in enumerate(layers):
            windows = 1 / np.maximum(1 - np.array(decays), LEAST)
            label = f"step {step:,}" if layer == 0 else None
            axes.plot([layer + 1 + offset] * len(windows), windows, "_", color=color, mew=1.5, label=label)
    axes.set_yscale("log")
    axes.set_xticks(range(1, len(recorded[0][1]) + 1))
    add_legend(axes)
    return figure


def _base_kernels(arm: Arm) -> list[tuple[int, list[list[float]]]]:
    return [(step, kernels) for step, kernels in arm.recorded("base_kernel", list[list[float]]) if kernels]


def draw_base_kernels(arm: Arm) -> Figure:
    """Weight of the base kernel by lag, at the start and at the end."""
    recorded = _base_kernels(arm)
    figure, (axes,) = begin_figure(f"Base kernel of {arm.name}", "lag, positions", "weight (mean along the diagonal)")
    (first_step, first), (last_step, last) = recorded[0], recorded[-1]
    axes.plot(first[0], color="C7", linestyle="--", label=f"step {first_step:,}")
    for index, kernel in enumerate(last):
        name = f"step {last_step:,}" + (f", layer {index + 1}" if len(last) > 1 else "")
        axes.plot(kernel, marker="." if len(kernel) <= 16 else None, label=name, linewidth=1.2)
    axes.axhline(0, color="C7", linewidth=0.6)
    add_legend(axes)
    return figure


def _length_of_kernel(arm: Arm) -> int | None:
    """Positions of a base kernel that differs from position to position; None where there is none."""
    return arm.recipe.model.max_positions if isinstance(arm.recipe, LanguageRecipe) else None


def draw_base_kernel_matrix(arm: Arm) -> Figure:
    """The whole base kernel of the best weights where it differs from position to position, i by j."""
    length = _length_of_kernel(arm)
    assert length is not None
    model = load(arm.begun[0].path)
    kernel = next(part for part in model.modules() if isinstance(part, BaseKernel))
    with torch.no_grad():
        matrix = kernel(torch.eye(length)[None])[0][0].numpy()
    figure, (axes,) = begin_figure(f"Base kernel of {arm.name}, best weights", "position j that is read", "position i")
    bound = float(np.quantile(np.abs(matrix), 0.999))
    axes.grid(visible=False)
    figure.colorbar(axes.imshow(matrix, cmap="RdBu", vmin=-bound, vmax=bound), ax=axes)
    return figure


def _is_refined(arm: Arm) -> bool:
    return bool(arm.recorded("eta", float))  # refinement is of the arm, not of a seed


def draw_refinement(arms: list[Arm]) -> Figure:
    """eta over training, and the residual of each refinement step at its end: a line per seed."""
    figure, (left, right) = begin_figure("Refinement", "", "", columns=2)
    most = 0
    for index, arm in enumerate(arm for arm in arms if _is_refined(arm)):
        for seed, run in enumerate(arm.begun):
            if not (etas := arm.recorded("eta", float, run)):
                continue  # begun, but not evaluated
            style: dict[str, Any] = {"color": f"C{index}", "linewidth": 1.2, "label": arm.name if seed == 0 else None}
            left.plot([step for step, _ in etas], [eta for _, eta in etas], **style)
            _, residuals = arm.recorded("residuals", list[float], run)[-1]
            right.plot(range(1, len(residuals) + 1), residuals, marker="o", markersize=4, **style)
            most = max(most, len(residuals))
    left.set(xlabel="step", ylabel="eta", ylim=(0, None))
    right.set(xlabel="refinement step", ylabel="|K(h) - h| / |h|, last evaluation", yscale="log")
    right.set_xticks(range(1, 1 + most))
    add_legend(left)
    return figure


REFINEMENT = OverviewPanel(
    name="refinement",
    caption="A line per seed. eta is the learned step size; a residual that falls from step to step approaches an "
    "equilibrium.",
    applies=lambda arms: any(_is_refined(arm) for arm in arms),
    draw=draw_refinement,
)
BASE_SHARES = ArmPanel(
    name="base-share",
    caption="Measured on validation text: |base| / (|base| + |decay|) in norm, first seed. The gate alone does "
    "not say it, since the kernel's own scale is free.",
    applies=lambda arm: len(arm.recorded("base_share", list[float])) >= 2,
    draw=draw_base_shares,
)
DECAYS = ArmPanel(
    name="decays",
    caption="A stroke per channel, first seed: how many positions back its memory reaches.",
    applies=lambda arm: bool(arm.recorded("decay", list[list[float]])),
    draw=draw_decays,
)
BASE_KERNELS = ArmPanel(
    name="base-kernel",
    caption="First seed.",
    applies=lambda arm: bool(_base_kernels(arm)),
    draw=draw_base_kernels,
)
BASE_KERNEL_MATRIX = ArmPanel(
    name="base-kernel-matrix",
    caption="First seed: row i is what position i takes of the positions before it.",
    applies=lambda arm: _length_of_kernel(arm) is not None and arm.has_weights,
    draw=draw_base_kernel_matrix,
)
