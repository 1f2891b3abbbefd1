"""Panels of losses: over training, at its end, inside a window; and of the norms of gradients and updates."""

from __future__ import annotations

import itertools

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from kmixer.analysis.panels.drawing import ArmPanel, OverviewPanel, add_legend, begin_figure
from kmixer.experiments.arms import Arm, Curve
from kmixer.runs.records import EvaluationLine


def _curves(arms: list[Arm]) -> list[tuple[str, Curve]]:
    """Of the arms that were evaluated after their first step, by name."""
    curves = ((arm.name, arm.losses()) for arm in arms)
    return [(name, curve) for name, curve in curves if curve is not None and len(curve.units) >= 2]


def draw_loss_curves(arms: list[Arm]) -> Figure:
    """Validation loss against what was trained and against wall time, mean and band over the seeds."""
    unit = arms[0].unit
    one = {"tokens": "a token", "images": "an image", "sequences": "a sequence"}[unit]
    figure, both = begin_figure("Validation loss over training", "", f"nats {one}", 2)
    lowest, highest = [], []
    for name, curve in _curves(arms):
        for axes, x in zip(both, (curve.units, curve.minutes), strict=True):
            (line,) = axes.plot(x[1:], curve.mean[1:], label=name, linewidth=1.5)
            axes.fill_between(x[1:], curve.low[1:], curve.high[1:], alpha=0.2, color=line.get_color())
        lowest.append(curve.low[1:].min())
        highest.append(np.quantile(curve.high[1:], 0.9))
    margin = 0.1 * (max(highest) - min(lowest)) + 0.01
    for axes, label in zip(both, (f"trained {unit}", "minutes"), strict=True):
        axes.set(xlabel=label, ylim=(min(lowest) - margin, max(highest) + margin))
        axes.xaxis.set_major_locator(MaxNLocator(5))
    both[0].xaxis.set_major_formatter(EngFormatter(sep=""))  # 100k, 2M
    add_legend(both[0])
    return figure


def draw_final_losses(arms: list[Arm]) -> Figure:
    """Each run's best validation loss, or accuracy, as a point, by arm."""
    metric = "loss" if arms[0].unit == "tokens" else "accuracy"
    unit = "nats per token" if metric == "loss" else f"part of the {arms[0].unit}"
    figure, (axes,) = begin_figure(f"Best validation {metric} of every seed", unit, "")
    ended = [arm for arm in arms if arm.results]
    for row, arm in enumerate(ended):
        values = list(arm.figures("loss" if metric == "loss" else "accuracy", "best", "validation").values())
        axes.plot(values, [row] * len(values), "o", alpha=0.7, markersize=5)
        axes.plot(np.mean(values), row, "|", markersize=16, color="black")
    axes.set_yticks(range(len(ended)), [arm.name for arm in ended])
    axes.invert_yaxis()
    return figure


def _losses_by_position(arm: Arm) -> list[list[float]]:
    measured = (results.best.loss_by_position for results in arm.results.values())
    return [losses for losses in measured if losses is not None]


def draw_loss_by_position(arms: list[Arm]) -> Figure:
    """Validation loss at each position of a window, averaged over stretches that double in length."""
    figure, (axes,) = begin_figure("Loss inside a window", "position", "nats per token")
    for arm in arms:
        if not (measured := _losses_by_position(arm)):
            continue
        mean = np.mean(measured, axis=0)
        edges = np.unique(np.concatenate([2 ** np.arange(0, np.log2(len(mean) + 1), 0.5), [len(mean) + 1]]).astype(int))
        middles = np.sqrt(edges[:-1] * (edges[1:] - 1.0))
        stretches = [mean[a - 1 : b - 1].mean() for a, b in itertools.pairwise(edges)]
        axes.plot(middles, stretches, label=arm.name)
    axes.set_xscale("log", base=2)
    add_legend(axes)
    return figure


def _stretches(arm: Arm) -> list[tuple[int, list[float]]]:
    """(step, losses of stretches of positions) of the first run, but for the evaluation before training."""
    measured = [(line.step, line.validation[0].stretches) for line in arm.evaluations()]
    return [(step, losses) for step, losses in measured if losses][1:]


def draw_positions_over_training(arm: Arm) -> Figure:
    """Validation loss of stretches of positions inside a window, over training."""
    figure, (axes,) = begin_figure(f"Loss by position in {arm.name}", "step", "nats per token")
    recorded = _stretches(arm)
    steps = [step for step, _ in recorded]
    for i, losses in enumerate(zip(*(stretches for _, stretches in recorded), strict=True)):
        name = f"positions {(1 << i - 1) + 1}-{1 << i}" if i > 1 else f"position {i + 1}"
        axes.plot(steps, losses, label=name, linewidth=1.2, color=mpl.colormaps["viridis"](i / len(recorded[0][1])))
    add_legend(axes)
    return figure


def _with_norms(arm: Arm) -> list[EvaluationLine]:
    return [line for line in arm.evaluations() if line.gradient_norms is not None]


def draw_norms(arm: Arm) -> Figure:
    """Norms of the gradient and of the update of each group of parameters over training."""
    figure, both = begin_figure(f"Gradients and updates of {arm.name}", "step", "", columns=2)
    lines = _with_norms(arm)
    steps = [line.step for line in lines]
    gradients = [line.gradient_norms or {} for line in lines]
    updates = [line.update_norms or {} for line in lines]
    for axes, norms, name in zip(both, (gradients, updates), ("gradient norm", "update norm"), strict=True):
        for group in norms[0]:
            axes.plot(steps, [norms_at_step.get(group, np.nan) for norms_at_step in norms], label=group, linewidth=1.2)
        axes.set_ylabel(name)
        axes.set_yscale("log")
    add_legend(both[0])
    return figure


LOSS_CURVES = OverviewPanel(
    name="loss-curves",
    caption="Mean over the seeds; the band reaches from the smallest to the largest.",
    applies=lambda arms: bool(_curves(arms)),
    draw=draw_loss_curves,
)
FINAL_LOSSES = OverviewPanel(
    name="final-losses",
    caption="A point per seed; the stroke is the mean. Each is the lowest of its run's evaluations.",
    applies=lambda arms: sum(bool(arm.results) for arm in arms) >= 2,
    draw=draw_final_losses,
)
LOSS_BY_POSITION = OverviewPanel(
    name="loss-by-position",
    caption="Best weights on the validation part: how much the text before helps.",
    applies=lambda arms: any(_losses_by_position(arm) for arm in arms),
    draw=draw_loss_by_position,
)
POSITIONS_OVER_TRAINING = ArmPanel(
    name="positions-over-training",
    caption="First seed: whether training goes on to use the text further back.",
    applies=lambda arm: len(_stretches(arm)) >= 2,
    draw=draw_positions_over_training,
)
NORMS = ArmPanel(
    name="norms",
    caption="Before clipping, by the groups of Koneko's optimiser, first seed.",
    applies=lambda arm: len(_with_norms(arm)) >= 2,
    draw=draw_norms,
)
