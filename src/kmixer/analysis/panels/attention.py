"""Panels of attention: bandwidths, how many keys a head looks at and how far, what a class token holds."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from kmixer.analysis.panels.drawing import HEIGHT, WIDTH, ArmPanel, add_legend, begin_figure, number_heads
from kmixer.experiments.arms import Arm
from kmixer.runs.records import ClassToken

Heads = list[list[float]]  # a number for each head of each layer


def draw_bandwidths(arm: Arm) -> Figure:
    """Bandwidth of every head: a map at the end, and over training."""
    recorded = arm.recorded("sigma", Heads)
    last_step, last = recorded[-1]
    figure, (left, right) = begin_figure(f"Bandwidths of {arm.name}", "", "", columns=2)
    image = left.imshow(np.array(last), aspect="auto", cmap="viridis", origin="lower")
    left.set(xlabel="head", ylabel="Gaussian layer")
    left.set_title(f"sigma, step {last_step:,}", fontsize=9)
    number_heads(left, np.array(last))
    figure.colorbar(image, ax=left)
    steps = [step for step, _ in recorded]
    for layer in range(len(recorded[0][1])):
        for head, values in enumerate(zip(*(sigma[layer] for _, sigma in recorded), strict=True)):
            label = f"layer {layer + 1}" if head == 0 else None
            right.plot(steps, values, color=f"C{layer % 10}", linewidth=1, label=label)
    right.set(xlabel="step", ylabel="sigma")
    right.set_title("a line per head", fontsize=9)
    add_legend(right)
    return figure


def draw_locality(arm: Arm) -> Figure:
    """Effective number of keys and mean distance of every head of attention at the end of training."""
    _, locality = arm.recorded("locality", dict[str, Heads])[-1]
    figure, both = begin_figure(f"Attention of {arm.name}, last evaluation", "head", "attention layer", columns=2)
    apart = "patches" if arm.unit == "images" else "positions"
    names = {"effective_keys": "effective keys, exp(entropy)", "distance": f"mean distance, {apart}"}
    for axes, (measure, title) in zip(both, names.items(), strict=True):
        values = np.array(locality[measure])
        figure.colorbar(axes.imshow(values, aspect="auto", cmap="viridis", origin="lower"), ax=axes)
        axes.set_title(title, fontsize=9)
        number_heads(axes, values)
    return figure


def draw_columns(arm: Arm) -> Figure:
    """How far columns are from adding to 1 in every layer, over training."""
    recorded = arm.recorded("column_residual", list[float])
    figure, (axes,) = begin_figure(f"Columns of attention of {arm.name}", "step", "column residual")
    for layer in range(len(recorded[0][1])):
        values = [residuals[layer] for _, residuals in recorded]
        axes.plot([step for step, _ in recorded], values, label=f"layer {layer + 1}", linewidth=1)
    axes.set_yscale("log")
    add_legend(axes)
    return figure


def _class_token(arm: Arm) -> ClassToken | None:
    """Of the first run that has one."""
    measured = (results.best.class_token for results in arm.results.values())
    return next((token for token in measured if token is not None), None)


def draw_class_token(arm: Arm) -> Figure:
    """A few images, and what the class token holds of each patch after all layers, by the attention weights."""
    token = _class_token(arm)
    assert token is not None
    images, rollouts = np.array(token.images), np.array(token.rollout)
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    figure.suptitle(f"What the class token of {arm.name} looks at", x=0.01, ha="left", fontsize=11)
    for index, (pixels, rollout) in enumerate(zip(images, rollouts, strict=True)):
        side = round(len(rollout) ** 0.5)
        gray = len(pixels) == 1
        shown = pixels[0] if gray else np.moveaxis(pixels, 0, -1)
        for row, (picture, colours) in enumerate(((shown, "gray"), (rollout.reshape(side, side), "viridis"))):
            axes = figure.add_subplot(2, len(images), row * len(images) + index + 1)
            axes.imshow(picture, cmap=colours)
            axes.set_axis_off()
    return figure


BANDWIDTHS = ArmPanel(
    name="bandwidths",
    caption="Gaussian attention, first seed: a small sigma keeps a token to itself and its like, a large one averages.",
    applies=lambda arm: len(arm.recorded("sigma", Heads)) >= 2,
    draw=draw_bandwidths,
)
LOCALITY = ArmPanel(
    name="locality",
    caption="Measured on validation data, first seed: how many keys a head attends to, and how far away.",
    applies=lambda arm: bool(arm.recorded("locality", dict[str, Heads])),
    draw=draw_locality,
)
COLUMNS = ArmPanel(
    name="columns",
    caption="Largest over positions of |what all take of it - 1|, mean over heads, on validation data, first seed: 0 "
    "where the weights are doubly stochastic; large scores need more iterations.",
    applies=lambda arm: len(arm.recorded("column_residual", list[float])) >= 2,
    draw=draw_columns,
)
CLASS_TOKEN = ArmPanel(
    name="class-token",
    caption="Validation images above; below, the weights of the class token on each patch, rolled out through "
    "all layers with half of each for the residual; first seed.",
    applies=lambda arm: _class_token(arm) is not None,
    draw=draw_class_token,
)
