"""The curves that trackers draw of a run: named numbers of a line of metrics.jsonl.

train/loss, train/learning_rate, train/gradient_norm, train/UNIT_per_second
validation/PROTOCOL/loss, .../bits_per_byte, .../accuracy
dynamics/NAME/LAYER, dynamics/gradient_norms/GROUP, dynamics/update_norms/GROUP
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kmixer.runs.records import UNITS

TRAINING = {
    "train_loss": "loss",
    "learning_rate": "learning_rate",
    "gradient_norm": "gradient_norm",
    **{f"{unit}_per_second": f"{unit}_per_second" for unit in UNITS},
}
FIGURES = ("loss", "bits_per_byte", "accuracy")
NORMS = ("gradient_norms", "update_norms")
# Of what was measured: they say what the lists beside them are of, and never change.
LABELS = ("layers", "lengths", "positions")


def series_of(line: dict[str, Any]) -> dict[str, float]:
    """The numbers of a line by the names of their series.

    What is measured by layer, head or bucket is a series for each; of a list for each of those, the mean.
    """
    values = {f"train/{name}": line[key] for key, name in TRAINING.items() if key in line}
    for measured in line.get("validation") or ():
        for figure in FIGURES:
            if measured.get(figure) is not None:
                values[f"validation/{measured['protocol']}/{figure}"] = measured[figure]
    values.update(_numbers("dynamics", line.get("dynamics") or {}))
    for norms in NORMS:
        values.update(_numbers(f"dynamics/{norms}", line.get(norms) or {}))
    return {name: float(value) for name, value in values.items()}


def _numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for key, part in value.items():
            if key not in LABELS:
                yield from _numbers(f"{name}/{key}", part)
    elif isinstance(value, list):
        for index, part in enumerate(value):
            if isinstance(part, list):
                numbers = list(_leaves(part))
                if numbers:
                    yield f"{name}/{index}", sum(numbers) / len(numbers)
            else:
                yield from _numbers(f"{name}/{index}", part)
    elif isinstance(value, int | float):
        yield name, value


def _leaves(value: Any) -> Iterator[float]:
    if isinstance(value, list):
        for part in value:
            yield from _leaves(part)
    elif isinstance(value, int | float):
        yield value
