"""What `kmixer lab ecology --rescue` measures: two ecologies of texts, several mixers, and counters as their null."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from kmixer.experiments.rescue import INTERVAL, Setting, run_rescue
from kmixer.experiments.statistics import paired_difference


def rescue(
    mixers: list[str], alphas: list[float], seeds: int, steps: int, told: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Train every mixer at every share of texts with brackets, and say what it tells apart beyond noise."""
    begun = time.monotonic()
    setting = Setting(steps=steps)
    results = run_rescue(mixers, alphas, list(range(seeds)), setting, told)
    about = {"name": ", ".join(mixers), "seeds": seeds, "steps": steps, "batch_size": setting.batch_size}
    return {**about, "seconds": time.monotonic() - begun, "evaluations": [summarised(result) for result in results]}


def summarised(result: dict[str, Any]) -> dict[str, Any]:
    """With the null of an evaluation, what is beyond it, and differences between mixers, paired by seed.

    The null is that of models which have seen no bracket, where alpha = 0 was asked for.
    """
    blind = [
        share
        for curve in result["curves"]
        for alpha, share in zip(result["alphas"], curve["shares"], strict=True)
        if alpha == 0
    ]
    null = None
    if blind:
        right = [value for share in blind for value in share["right"]]
        largest = max(abs(value) for share in blind for value in share["discrimination"])
        null = {"discrimination": largest, "right": [min(right), max(right)]}
    curves = [{**curve, "shares": [_found(share, null) for share in curve["shares"]]} for curve in result["curves"]]
    first, *others = curves
    differences = [
        {
            "mixer": other["mixer"],
            "from": first["mixer"],
            "shares": [_difference(*pair) for pair in _pairs(other, first)],
        }
        for other in others
    ]
    return {**result, "curves": curves, "null": null, "differences": differences}


def _found(share: dict[str, Any], null: dict[str, Any] | None) -> dict[str, Any]:
    """With the mean over seeds, and whether it is more than pairs and models without brackets make by chance."""
    values = share["discrimination"]
    mean, error = sum(values) / len(values), max(share["error"])
    limit = max(INTERVAL * error, 0.0 if null is None else null["discrimination"])
    return {**share, "mean": mean, "differs": abs(mean) > limit}


def _pairs(other: dict[str, Any], first: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    return list(zip(other["shares"], first["shares"], strict=True))


def _difference(share: dict[str, Any], baseline: dict[str, Any]) -> dict[str, Any]:
    values = [dict(enumerate(one["discrimination"])) for one in (share, baseline)]
    difference = paired_difference(*values)
    assert difference is not None
    return {"mean": difference.mean, "interval": difference.interval}
