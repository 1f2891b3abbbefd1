"""What the runs of each arm have learned, summarised over the seeds from what training recorded last."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from kmixer.experiments.compare import Arm
from kmixer.experiments.statistics import summarize
from kmixer.experiments.tables import with_deviation

# One column each: heading, the numbers of a recorded measurement (see `measure_dynamics`), digits.
COLUMNS: dict[str, tuple[Callable[[dict[str, Any]], Iterable[float]], int]] = {
    "gate": (lambda d: d.get("gate", ()), 3),
    "base share": (lambda d: d.get("base_share", ()), 3),
    "alpha": (lambda d: _flat(d.get("alpha", ())), 3),
    "decay": (lambda d: _flat(d.get("decay", ())), 4),
    "eta": (lambda d: [d["eta"]] if "eta" in d else (), 4),
    "last residual": (lambda d: d.get("residuals", ())[-1:], 4),
    "sigma": (lambda d: _flat(d.get("sigma", ())), 2),
    "effective keys": (lambda d: _flat(d.get("locality", {}).get("effective_keys", ())), 1),
    "weight of level 0": (lambda d: [head[0] for head in _flat(d.get("level_weights", ()))], 3),
}


def _flat(nested: Iterable[Iterable[Any]]) -> list[Any]:
    return [value for part in nested for value in part]


def learned_table(arms: list[Arm]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Headings and a line an arm: mean and deviation over seeds of each run's mean, and (lowest to highest) of all.

    Columns of which no arm has anything are left out, and so are arms without runs that ended.
    """
    ended = [arm for arm in arms if arm.runs]
    found = [[_last_dynamics(run.read_metrics()) for run in arm.runs] for arm in ended]
    columns = {"arm": [arm.name for arm in ended]}
    for heading, (numbers_of, digits) in COLUMNS.items():
        cells = [_cell([list(numbers_of(each)) for each in runs], digits) for runs in found]
        if any(cells):
            columns[heading] = cells
    return tuple(columns), list(zip(*columns.values(), strict=True))


def _last_dynamics(lines: list[dict[str, Any]]) -> dict[str, Any]:
    return next((line["dynamics"] for line in reversed(lines) if "dynamics" in line), {})


def _cell(runs: list[list[float]], digits: int) -> str:
    runs = [numbers for numbers in runs if numbers]
    if not runs:
        return ""
    summary = summarize([sum(numbers) / len(numbers) for numbers in runs])
    text = with_deviation(summary.mean, summary.deviation, digits)
    every = _flat(runs)
    return text if len(runs[0]) == 1 else f"{text} ({min(every):,.{digits}f} to {max(every):,.{digits}f})"


LEARNED = (
    "Means over layers and channels or heads at the last evaluation, +- deviation over seeds, (lowest to highest of "
    "all). Base share: |base| / (|base| + |decay|) in norm, measured on validation text."
)
