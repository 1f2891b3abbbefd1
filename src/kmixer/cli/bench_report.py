"""What the parts of kmixer bench print: rows as a table, or as JSON, with the machine they were measured on."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import torch

from kmixer.bench.measure import Roofs
from kmixer.runs.environment import environment

SCALES = {"ms": 1e3, "MB": 1e-6}


def print_report(
    what: str, measured: Roofs | None, rows: list[dict[str, Any]], columns: dict[str, str], as_json: bool
) -> None:
    """Print rows, and the roofs of the machine where they were measured."""
    made_with = environment(torch.device("cpu"))
    if as_json:
        reached = {"threads": torch.get_num_threads()} if measured is None else asdict(measured)
        print(json.dumps({"what": what, "roofs": reached, "rows": rows, "environment": made_with}))
        return
    print(f"{made_with['device']}, threads {torch.get_num_threads()}, medians")
    print_table(rows, columns)


def print_table(rows: list[dict[str, Any]], columns: dict[str, str]) -> None:
    """Rows of figures, of those columns, by title."""
    table = [list(columns)] + [[_shown(title, row.get(key)) for title, key in columns.items()] for row in rows]
    widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
    for line in table:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def _shown(title: str, value: Any) -> str:
    scale = SCALES.get(title.split()[-1])
    if value is None:
        return "-"
    if isinstance(value, float) or scale is not None:
        value = value * (scale or 1)
        return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
