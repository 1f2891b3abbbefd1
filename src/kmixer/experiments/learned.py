"""What the runs of each arm have learned, summarised over the seeds from what training recorded last."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from kmixer.experiments.arms import Arm
from kmixer.experiments.statistics import summarize
from kmixer.experiments.tables import with_deviation

LEARNED = (
    "Means over layers and channels or heads at the last evaluation, +- deviation over seeds, (lowest to highest of "
    "all). Base share: |base| / (|base| + |decay|) in norm, measured on validation text."
)


class Column(NamedTuple):
    """A column of the table: which of the recorded dynamics (see `measure_dynamics`), and its numbers."""

    heading: str
    measure: str
    shape: Any
    numbers: Callable[[Any], Iterable[float]]
    digits: int


COLUMNS = (
    Column("gate", "gate", list[float], list, 3),
    Column("base share", "base_share", list[float], list, 3),
    Column("alpha", "alpha", list[list[float]], chain.from_iterable, 3),
    Column("decay", "decay", list[list[float]], chain.from_iterable, 4),
    Column("eta", "eta", float, lambda eta: [eta], 4),
    Column("last residual", "residuals", list[float], lambda residuals: residuals[-1:], 4),
    Column("copy gate", "copy_gate", list[float] | list[list[float]], lambda gates: np.ravel(gates).tolist(), 3),
    Column("sigma", "sigma", list[list[float]], chain.from_iterable, 2),
    Column("temperature", "temperature", list[list[float]], chain.from_iterable, 3),
    Column("column residual", "column_residual", list[float], list, 4),
    Column(
        "effective keys",
        "locality",
        dict[str, list[list[float]]],
        lambda locality: chain.from_iterable(locality.get("effective_keys", [])),
        1,
    ),
    Column(
        "weight of level 0",
        "level_weights",
        list[list[list[float]]],
        lambda layers: (levels[0] for heads in layers for levels in heads),
        3,
    ),
)


def learned_table(arms: list[Arm]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Headings and a line per arm: mean and deviation over seeds of each run's mean, and (lowest to highest) of all.

    Columns of which no arm has anything are left out, and so are arms without runs that ended.
    """
    ended = [arm for arm in arms if arm.ended]
    columns = {"arm": [arm.name for arm in ended]}
    for column in COLUMNS:
        cells = [_cell(arm, column) for arm in ended]
        if any(cells):
            columns[column.heading] = cells
    return tuple(columns), list(zip(*columns.values(), strict=True))


def _cell(arm: Arm, column: Column) -> str:
    recorded = (arm.recorded(column.measure, column.shape, run) for run in arm.ended)
    runs = [numbers for lines in recorded if lines and (numbers := list(column.numbers(lines[-1][1])))]
    if not runs:
        return ""
    summary = summarize([sum(numbers) / len(numbers) for numbers in runs])
    text = with_deviation(summary.mean, summary.deviation, column.digits)
    every = list(chain.from_iterable(runs))
    if len(runs[0]) == 1:
        return text
    return f"{text} ({min(every):,.{column.digits}f} to {max(every):,.{column.digits}f})"
