"""Figures of runs: each function draws one, from what training recorded, and returns None where there is nothing."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from kmixer.analysis.curves import ArmRuns
from kmixer.errors import one_line
from kmixer.language_model import load
from kmixer.layers import BaseKernel
from kmixer.runs.recipe import LanguageRecipe

WIDTH, HEIGHT = 6.4, 3.6
# Of the many curves of a figure, the legend names as many as one can tell apart; more than a few stand below the axes.
LEGEND_LIMIT, LEGEND_INSIDE = 12, 5
LEGEND_COLUMNS, LEGEND_ROW_HEIGHT = 3, 0.2


def _figure(title: str, x: str, y: str, columns: int = 1) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    axes = [figure.add_subplot(1, columns, i + 1) for i in range(columns)]
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    for each in axes:
        each.set_xlabel(x)
        each.set_ylabel(y)
        each.grid(alpha=0.25)
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _legend(axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if 1 < len(handles) <= LEGEND_INSIDE:
        axes.legend(frameon=False, fontsize=8)
    elif LEGEND_INSIDE < len(handles) <= LEGEND_LIMIT:
        figure = axes.get_figure(root=True)
        assert figure is not None
        figure.set_figheight(HEIGHT + LEGEND_ROW_HEIGHT * math.ceil(len(handles) / LEGEND_COLUMNS))
        place: Literal["outside lower center"] = "outside lower center"
        figure.legend(handles, labels, loc=place, ncols=LEGEND_COLUMNS, frameon=False, fontsize=8)


def _number_heads(axes: Axes, image: np.ndarray[Any, Any]) -> None:
    """An image of layers by heads, both numbered from 1 on."""
    axes.grid(visible=False)
    layers, heads = image.shape
    axes.set_yticks(range(layers), [str(layer + 1) for layer in range(layers)])
    axes.set_xticks(range(heads), [str(head + 1) for head in range(heads)])


def loss_curves(arms: list[ArmRuns]) -> Figure | None:
    """Validation loss against what was trained and against wall time, mean and band over the seeds."""
    unit = arms[0].unit
    one = {"tokens": "a token", "images": "an image", "sequences": "a sequence"}[unit]
    figure, both = _figure("Validation loss over training", "", f"nats {one}", 2)
    lowest, highest = [], []
    for arm in arms:
        curve = arm.losses()
        if curve is None or len(curve.units) < 2:
            continue
        for axes, x in zip(both, (curve.units, curve.minutes), strict=True):
            (line,) = axes.plot(x[1:], curve.mean[1:], label=arm.name, linewidth=1.5)
            axes.fill_between(x[1:], curve.low[1:], curve.high[1:], alpha=0.2, color=line.get_color())
        lowest.append(curve.low[1:].min())
        highest.append(np.quantile(curve.high[1:], 0.9))
    if not lowest:
        return None
    margin = 0.1 * (max(highest) - min(lowest)) + 0.01
    for axes, label in zip(both, (f"trained {unit}", "minutes"), strict=True):
        axes.set(xlabel=label, ylim=(min(lowest) - margin, max(highest) + margin))
        axes.xaxis.set_major_locator(MaxNLocator(5))
    both[0].xaxis.set_major_formatter(EngFormatter(sep=""))  # 100k, 2M
    _legend(both[0])
    return figure


def final_losses(arms: list[ArmRuns]) -> Figure | None:
    """Each run's best validation loss, or accuracy, as a point, by arm."""
    metric = "loss" if arms[0].unit == "tokens" else "accuracy"
    found = [(arm.name, [r["best"]["validation"][0][metric] for r in arm.results if r]) for arm in arms]
    found = [(name, losses) for name, losses in found if losses]
    if len(found) < 2:
        return None
    unit = "nats a token" if metric == "loss" else f"part of the {arms[0].unit}"
    figure, (axes,) = _figure(f"Best validation {metric} of every seed", unit, "")
    for row, (_, losses) in enumerate(found):
        axes.plot(losses, [row] * len(losses), "o", alpha=0.7, markersize=5)
        axes.plot(np.mean(losses), row, "|", markersize=16, color="black")
    axes.set_yticks(range(len(found)), [name for name, _ in found])
    axes.invert_yaxis()
    return figure


def base_shares(arm: ArmRuns) -> Figure | None:
    """Measured share of the base kernel, and its gate, in each layer over training."""
    recorded = [(step, each) for step, each in arm.dynamics() if "base_share" in each]
    if len(recorded) < 2:
        return None
    figure, both = _figure(f"Base kernel in {arm.name}: a line a layer", "step", "", columns=2)
    steps = [step for step, _ in recorded]
    for axes, key, name in zip(both, ("base_share", "gate"), ("share of the mixed output", "gate"), strict=True):
        for layer, values in enumerate(zip(*(each[key] for _, each in recorded), strict=True)):
            axes.plot(steps, values, label=f"layer {layer + 1}", linewidth=1.2)
        axes.set_ylabel(name)
        axes.set_ylim(0, 1)
    _legend(both[0])
    return figure


def decay_spectra(arm: ArmRuns) -> Figure | None:
    """Effective window 1 / (1 - decay) of every channel, at the start and at the end of training."""
    recorded = [(step, each) for step, each in arm.dynamics() if "decay" in each]
    if not recorded:
        return None
    figure, (axes,) = _figure(f"Decays of {arm.name}", "K2 layer", "effective window 1 / (1 - decay), positions")
    for (step, each), offset, color in ((recorded[0], -0.15, "C7"), (recorded[-1], 0.15, "C0")):
        for layer, decays in enumerate(each["decay"]):
            windows = 1 / np.maximum(1 - np.array(decays), 1e-7)
            label = f"step {step:,}" if layer == 0 else None
            axes.plot([layer + 1 + offset] * len(windows), windows, "_", color=color, mew=1.5, label=label)
    axes.set_yscale("log")
    axes.set_xticks(range(1, len(recorded[0][1]["decay"]) + 1))
    _legend(axes)
    return figure


def base_kernels(arm: ArmRuns) -> Figure | None:
    """Weight of the base kernel by lag, at the start and at the end."""
    recorded = [(step, each["base_kernel"]) for step, each in arm.dynamics() if each.get("base_kernel")]
    if not recorded:
        return None
    figure, (axes,) = _figure(f"Base kernel of {arm.name}", "lag, positions", "weight (mean along the diagonal)")
    first, last = recorded[0], recorded[-1]
    axes.plot(first[1][0], color="C7", linestyle="--", label=f"step {first[0]:,}")
    for index, kernel in enumerate(last[1]):
        name = f"step {last[0]:,}" + (f", layer {index + 1}" if len(last[1]) > 1 else "")
        axes.plot(kernel, marker="." if len(kernel) <= 16 else None, label=name, linewidth=1.2)
    axes.axhline(0, color="C7", linewidth=0.6)
    _legend(axes)
    return figure


def bandwidths(arm: ArmRuns) -> Figure | None:
    """Bandwidth of every head of Gaussian attention: a map at the end, and over training."""
    recorded = [(step, each["sigma"]) for step, each in arm.dynamics() if "sigma" in each]
    if len(recorded) < 2:
        return None
    figure, (left, right) = _figure(f"Bandwidths of {arm.name}", "", "", columns=2)
    image = left.imshow(np.array(recorded[-1][1]), aspect="auto", cmap="viridis", origin="lower")
    left.set(xlabel="head", ylabel="Gaussian layer")
    left.set_title(f"sigma, step {recorded[-1][0]:,}", fontsize=9)
    _number_heads(left, np.array(recorded[-1][1]))
    figure.colorbar(image, ax=left)
    steps = [step for step, _ in recorded]
    for layer in range(len(recorded[0][1])):
        for head, values in enumerate(zip(*(sigma[layer] for _, sigma in recorded), strict=True)):
            label = f"layer {layer + 1}" if head == 0 else None
            right.plot(steps, values, color=f"C{layer % 10}", linewidth=1, label=label)
    right.set(xlabel="step", ylabel="sigma")
    right.set_title("a line a head", fontsize=9)
    _legend(right)
    return figure


def locality(arm: ArmRuns) -> Figure | None:
    """Effective number of keys and mean distance of every head of attention at the end of training."""
    recorded = [each["locality"] for _, each in arm.dynamics() if "locality" in each]
    if not recorded:
        return None
    figure, both = _figure(f"Attention of {arm.name}, last evaluation", "head", "attention layer", columns=2)
    apart = "patches" if arm.unit == "images" else "positions"
    names = {"effective_keys": "effective keys, exp(entropy)", "distance": f"mean distance, {apart}"}
    for axes, (key, title) in zip(both, names.items(), strict=True):
        values = np.array(recorded[-1][key])
        figure.colorbar(axes.imshow(values, aspect="auto", cmap="viridis", origin="lower"), ax=axes)
        axes.set_title(title, fontsize=9)
        _number_heads(axes, values)
    return figure


def level_weights(arm: ArmRuns) -> Figure | None:
    """Weight of every level over training, mean over heads, and the symmetric part of its scores at the end."""
    recorded = [(step, each) for step, each in arm.dynamics() if "level_weights" in each]
    if len(recorded) < 2:
        return None
    figure, (left, right) = _figure(f"Levels of {arm.name}", "", "", columns=2)
    steps = [step for step, _ in recorded]
    weights = np.array([each["level_weights"] for _, each in recorded]).mean(2)  # (steps, layers, levels)
    for layer in range(weights.shape[1]):
        for level in range(weights.shape[2]):
            label = f"layer {layer + 1}, level {level}"
            left.plot(steps, weights[:, layer, level], color=f"C{layer % 10}", alpha=1 / (1 + 0.7 * level), label=label)
        shares = [np.mean(heads) for heads in recorded[-1][1]["levels"][layer]["reciprocity"]]
        right.plot(range(len(shares)), shares, marker="o", markersize=4, label=f"layer {layer + 1}")
    left.set(xlabel="step", ylabel="weight, mean over heads", ylim=(0, None))
    right.set(xlabel="level", ylabel="symmetric part of the scores", ylim=(0, 1))
    right.set_xticks(range(weights.shape[2]))
    _legend(left)
    return figure


def level_approximation(arm: ArmRuns) -> Figure | None:
    """How far the scores of the first levels are from full attention, and from those of all levels, at the end."""
    recorded = [each["levels"] for _, each in arm.dynamics() if "levels" in each]
    if not recorded or len(recorded[-1][0]["remainder"]) < 2:
        return None
    figure, both = _figure(f"Scores of the first levels of {arm.name}", "levels", "", columns=2)
    names = {"fit_error": "relative distance from full attention", "remainder": "relative part that later levels add"}
    for axes, (key, name) in zip(both, names.items(), strict=True):
        for layer, levels in enumerate(recorded[-1]):
            means = [np.mean(heads) for heads in levels[key] if heads]
            axes.plot(range(1, len(means) + 1), means, marker="o", markersize=4, label=f"layer {layer + 1}")
        axes.set_ylabel(name)
        axes.set_xticks(range(1, len(recorded[-1][0][key]) + 1))
        axes.set_ylim(bottom=0)
    _legend(both[1])
    return figure


def class_tokens(arm: ArmRuns) -> Figure | None:
    """A few images, and what the class token holds of each patch after all layers, by the attention weights."""
    found = next((r["best"]["class_token"] for r in arm.results if r and "class_token" in r["best"]), None)
    if found is None:
        return None
    images, rollouts = np.array(found["images"]), np.array(found["rollout"])
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


def refinement(arms: list[ArmRuns]) -> Figure | None:
    """eta over training, and the residual of each refinement step at its end: a line a seed."""
    refined: list[tuple[str, list[list[tuple[int, dict[str, Any]]]]]] = []
    for arm in arms:
        runs = [recorded for i in range(len(arm.runs)) if (recorded := arm.dynamics(i))]
        if runs and "eta" in runs[0][-1][1]:  # refinement is of the arm, not of a seed
            refined.append((arm.name, runs))
    if not refined:
        return None
    figure, (left, right) = _figure("Refinement", "", "", columns=2)
    for index, (name, runs) in enumerate(refined):
        for seed, recorded in enumerate(runs):
            style: dict[str, Any] = {"color": f"C{index}", "linewidth": 1.2, "label": name if seed == 0 else None}
            left.plot([step for step, _ in recorded], [each["eta"] for _, each in recorded], **style)
            residuals = recorded[-1][1]["residuals"]
            right.plot(range(1, len(residuals) + 1), residuals, marker="o", markersize=4, **style)
    left.set(xlabel="step", ylabel="eta", ylim=(0, None))
    right.set(xlabel="refinement step", ylabel="|K(h) - h| / |h|, last evaluation", yscale="log")
    right.set_xticks(range(1, 1 + max(len(runs[0][-1][1]["residuals"]) for _, runs in refined)))
    _legend(left)
    return figure


def loss_by_position(arms: list[ArmRuns]) -> Figure | None:
    """Validation loss at each position of a window, averaged over stretches that double in length."""
    figure, (axes,) = _figure("Loss inside a window", "position", "nats a token")
    drawn = False
    for arm in arms:
        found = [np.array(r["best"]["loss_by_position"]) for r in arm.results if r and "loss_by_position" in r["best"]]
        if not found:
            continue
        mean = np.mean(found, axis=0)
        edges = np.unique(np.concatenate([2 ** np.arange(0, np.log2(len(mean) + 1), 0.5), [len(mean) + 1]]).astype(int))
        middles = np.sqrt(edges[:-1] * (edges[1:] - 1.0))
        stretches = [mean[a - 1 : b - 1].mean() for a, b in itertools.pairwise(edges)]
        axes.plot(middles, stretches, label=arm.name)
        drawn = True
    axes.set_xscale("log", base=2)
    _legend(axes)
    return figure if drawn else None


def positions_over_training(arm: ArmRuns) -> Figure | None:
    """Validation loss of stretches of positions inside a window, over training."""
    recorded = [
        (line["step"], line["validation"][0]["stretches"])
        for line in arm.metrics[0]
        if "validation" in line and line["validation"][0].get("stretches")
    ]
    if len(recorded) < 3:
        return None
    figure, (axes,) = _figure(f"Loss by position in {arm.name}", "step", "nats a token")
    steps = [step for step, _ in recorded[1:]]
    for i, losses in enumerate(zip(*(found for _, found in recorded[1:]), strict=True)):
        name = f"positions {(1 << i - 1) + 1}-{1 << i}" if i > 1 else f"position {i + 1}"
        axes.plot(steps, losses, label=name, linewidth=1.2, color=mpl.colormaps["viridis"](i / len(recorded[0][1])))
    _legend(axes)
    return figure


def base_kernel_matrix(arm: ArmRuns) -> Figure | None:
    """The whole base kernel of the best weights where it differs from position to position, i by j."""
    recipe = arm.runs[0].read_recipe()
    if not isinstance(recipe, LanguageRecipe) or recipe.model.max_positions is None or not arm.has_weights:
        return None
    model = load(arm.runs[0].path)
    kernel = next(part for part in model.modules() if isinstance(part, BaseKernel))
    with torch.no_grad():
        matrix = kernel(torch.eye(recipe.model.max_positions)[None])[0][0].numpy()
    figure, (axes,) = _figure(f"Base kernel of {arm.name}, best weights", "position j that is read", "position i")
    bound = float(np.quantile(np.abs(matrix), 0.999))
    axes.grid(visible=False)
    figure.colorbar(axes.imshow(matrix, cmap="RdBu", vmin=-bound, vmax=bound), ax=axes)
    return figure


def norms(arm: ArmRuns) -> Figure | None:
    """Norms of the gradient and of the update of each group of parameters over training."""
    recorded = [line for line in arm.metrics[0] if "gradient_norms" in line]
    if len(recorded) < 2:
        return None
    figure, both = _figure(f"Gradients and updates of {arm.name}", "step", "", columns=2)
    steps = [line["step"] for line in recorded]
    for axes, key, name in zip(both, ("gradient_norms", "update_norms"), ("gradient norm", "update norm"), strict=True):
        for group in recorded[0][key]:
            axes.plot(steps, [line[key].get(group, np.nan) for line in recorded], label=group, linewidth=1.2)
        axes.set_ylabel(name)
        axes.set_yscale("log")
    _legend(both[0])
    return figure


def all_figures(arms: list[ArmRuns]) -> dict[str, Figure]:
    """Every figure that these runs have something for, by a name fit for a file."""
    # matplotlib reads $...$ as a formula, and has no glyph for a control sign.
    arms = [replace(arm, name=one_line(arm.name).replace("$", r"\$")) for arm in arms]
    found: dict[str, Figure | None] = {
        "loss-curves": loss_curves(arms),
        "final-losses": final_losses(arms),
        "loss-by-position": loss_by_position(arms),
        "refinement": refinement(arms),
    }
    for arm in arms:
        suffix = "" if len(arms) == 1 else f"-{_slug(arm.name)}"
        single: dict[str, Any] = {
            "base-share": base_shares,
            "decays": decay_spectra,
            "base-kernel": base_kernels,
            "base-kernel-matrix": base_kernel_matrix,
            "positions-over-training": positions_over_training,
            "bandwidths": bandwidths,
            "locality": locality,
            "levels": level_weights,
            "level-approximation": level_approximation,
            "class-token": class_tokens,
            "norms": norms,
        }
        found |= {name + suffix: draw(arm) for name, draw in single.items()}
    return {name: figure for name, figure in found.items() if figure is not None}


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() or c in "=.-" else "-" for c in name)
