"""Panel of an ecology: how far sources of text are apart, and which are merged from which beta on."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from kmixer.analysis.panels.drawing import begin_figure, label_of
from kmixer.analysis.panels.lab import panel_of
from kmixer.runs.lab_ecology import EcologyOfModel, EcologyRecord, EcologyStep

# Characters of a source's name, and sources whose numbers are written into the map.
NAME, WRITTEN = 18, 6


def draw_ecology(record: EcologyRecord) -> Figure:
    """The matrix as a map, the model's where there is one, and the tree of merges over beta with the null's band."""
    names = [_short(name) for name in record.sources]
    of_model = record.model is not None
    title = f"Sources of text, context {record.context}" + (f", and what {record.name} predicts" if of_model else "")
    figure, [left, *rest] = begin_figure(title, "", "", columns=2 + of_model)
    figure.set_size_inches(8.0 + 3.0 * of_model, 3.6)
    pairs = {(pair.first, pair.second): "" if pair.differs else "none\nfound" for pair in record.pairs}
    _draw_map(left, "JS of texts, nats per token; diagonal: the null", names, record, pairs)
    if record.model is not None:
        says = {(pair.first, pair.second): pair.says for pair in record.model.pairs}
        _draw_map(rest[0], "JS of the model's laws", names, record.model, says)
        rest[0].set_yticklabels([])
    _draw_tree(rest[-1], record, names)
    return figure


def _draw_map(
    axes: Axes,
    title: str,
    names: list[str],
    measured: EcologyRecord | EcologyOfModel,
    words: dict[tuple[int, int], str],
) -> None:
    """On the diagonal two halves of one source, the null."""
    values = np.array(measured.js) + np.diag([null.mean for null in measured.null])
    largest = max(float(values.max()), 1e-9)
    axes.imshow(values, cmap="Blues", vmin=0, vmax=1.25 * largest)
    axes.grid(visible=False)
    axes.set_title(title, fontsize=9)
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right", fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    if len(names) > WRITTEN:
        return
    for a in range(len(names)):
        for b in range(len(names)):
            said = words.get((min(a, b), max(a, b)), "") if a != b else ""
            color = "0.45" if a == b else "white" if values[a, b] > 0.8 * largest else "black"
            text = _number(values[a, b]) + (f"\n{said}" if said else "")
            axes.text(b, a, text, color=color, fontsize=7.5, ha="center", va="center")


def _draw_tree(axes: Axes, record: EcologyRecord, names: list[str]) -> None:
    """Every cell is a line from where it begins to where the one that holds it does."""
    axes.set_title("best cells by beta" + ("" if record.exact else ", greedy"), fontsize=9)
    order = _order(record.path)
    height = {state: float(index) for index, state in enumerate(order)}
    begun = {frozenset([state]): 0.0 for state in order}
    band = [null.largest / math.log(2) for null in record.null]
    last = 1.12 * max([step.beta for step in record.path] + band) or 1.0
    for state, largest in enumerate(band):
        axes.barh(height[state], largest, height=0.98, color="0.5", alpha=0.3, linewidth=0)
    axes.bar([0], [0], color="0.5", alpha=0.3, label="null: beta* of two halves of this source")
    before = list(begun)
    for step in record.path:
        cells = [frozenset(cell) for cell in step.cells]
        color = "0.55" if step.noise else "C0"
        for cell in cells:
            parts = [part for part in before if part < cell and any(state in cell for state in part)]
            if not parts:
                continue
            ends = [_middle(part, height) for part in parts]
            for part, end in zip(parts, ends, strict=True):
                axes.plot([begun[part], step.beta], [end, end], color=color, linewidth=1.6)
            axes.plot([step.beta] * 2, [min(ends), max(ends)], color=color, linewidth=1.6)
            begun[cell] = step.beta
        before = cells
    for cell in before:
        middle = _middle(cell, height)
        axes.plot([begun[cell], last], [middle, middle], color="C0", linewidth=1.6)
    axes.set_yticks(range(len(order)), [names[state] for state in order], fontsize=8)
    axes.set_ylim(len(order) - 0.4, -1.1)
    axes.set_xlim(0, last)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel("beta, nats of loss for a nat of complexity", fontsize=9)
    axes.grid(axis="y", visible=False)
    axes.legend(frameon=False, fontsize=7.5, loc="upper left", borderaxespad=0.1)


def _order(path: list[EcologyStep]) -> list[int]:
    """Sources so that cells stand together: sorted by the cells of the path, from the last to the first."""
    keys: dict[int, tuple[Any, ...]] = {}
    for state in (state for cell in path[0].cells for state in cell):
        of_steps = [next(cell for cell in step.cells if state in cell) for step in reversed(path)]
        keys[state] = (*(min(cell) for cell in of_steps), state)
    return sorted(keys, key=lambda state: keys[state])


def _middle(cell: frozenset[int], height: dict[int, float]) -> float:
    return sum(height[state] for state in cell) / len(cell)


def _number(value: float) -> str:
    return f"{value:.4f}".removeprefix("0")


def _short(name: str) -> str:
    return label_of(name if len(name) <= NAME else f"{name[: NAME - 3]}...")


ECOLOGY = panel_of(
    EcologyRecord,
    draw_ecology,
    "Jensen-Shannon divergence of what follows the same contexts in sources of text, on halves, and of what the model "
    "predicts there. Merges inside the grey of their sources are noise. It does not say that training does this.",
)
