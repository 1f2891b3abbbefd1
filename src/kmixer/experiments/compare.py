"""Runs and sweeps side by side: what each arm gave over its seeds, and how it differs from the first."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from kmixer.errors import InputError
from kmixer.experiments.statistics import paired_difference, summarize
from kmixer.experiments.sweep import SWEEP, Sweep, run_path
from kmixer.files import read_json
from kmixer.training.run_folder import ENVIRONMENT, RunFolder

Weights = Literal["best", "last"]
Part = Literal["validation", "test"]
Metric = Literal["loss", "accuracy"]
UNITS = ("tokens", "images", "sequences")
# What is summarised over the seeds, of what was measured.
FIGURES = ("loss", "perplexity", "bits_per_byte", "accuracy")


@dataclass(frozen=True)
class Arm:
    """Runs that differ in their seed alone."""

    name: str
    results: dict[int, dict[str, Any]]  # results.json by seed
    unfinished: int  # runs that have not ended
    protocol: dict[str, Any] = field(default_factory=dict)  # what two arms must share to be compared
    runs: list[RunFolder] = field(default_factory=list)  # those that have ended

    def figures(self, name: str, weights: Weights, part: Part) -> dict[int, float]:
        """A figure by seed, "loss" or "accuracy" or another, as the recipe's first protocol measured it."""
        return {
            seed: result[weights][part][0][name]
            for seed, result in self.results.items()
            if part in result[weights] and name in result[weights][part][0]
        }


def read_arms(paths: list[Path]) -> list[Arm]:
    """The arms of run folders and sweeps that have ended runs, in the order given.

    Raises InputError where a path is neither, or none of its runs has ended.
    """
    arms = []
    for path in paths:
        ended = [arm for arm in arms_of(path) if arm.results]
        if not ended:
            raise InputError(
                f"{path}: none of its runs has ended; go on with kmixer train --resume, or the same kmixer sweep"
            )
        arms += ended
    return arms


def arms_of(path: Path) -> list[Arm]:
    """Every arm of a sweep, or a run as an arm of its own. Raises InputError where the path is neither."""
    if not (path / SWEEP).is_file():
        RunFolder(path).read_recipe()
        return [_read_arm(path.name, [path])]
    sweep = Sweep.read(path)
    return [
        _read_arm(f"{path.name}/{name}", [run_path(path, name, seed) for seed in sweep.seeds]) for name in sweep.arms
    ]


def _read_arm(name: str, paths: list[Path]) -> Arm:
    runs = [RunFolder(path) for path in paths]
    ended = [(run, results) for run in runs if (results := run.results()) is not None]
    protocol = _protocol(ended[0][0]) if ended else {}
    by_seed = {results["seed"]: results for _, results in ended}
    return Arm(name, by_seed, len(runs) - len(ended), protocol, [run for run, _ in ended])


def _protocol(run: RunFolder) -> dict[str, Any]:
    return {"corpus": read_json(run.path / ENVIRONMENT)["corpus_sha256"], **run.read_recipe().measures()}


@dataclass(frozen=True)
class Reach:
    """When the runs of an arm first measured a validation loss at or below a target."""

    target: float  # nats
    seeds: int  # runs that reached it
    of: int
    units: float | None  # trained until then, mean over those runs; None where there are none
    seconds: float | None


def reach_of(arms: list[Arm], target: float) -> list[Reach]:
    """How much training each arm needs for a validation loss."""
    return [_reach(arm, target) for arm in arms]


def _reach(arm: Arm, target: float) -> Reach:
    found = []
    for run in arm.runs:
        per_step = run.read_recipe().units_per_step
        evaluated = (line for line in run.read_metrics() if "validation" in line)
        first = next((line for line in evaluated if line["validation"][0]["loss"] <= target), None)
        if first is not None:
            found.append((first["step"] * per_step, first["seconds"]))
    units, seconds = (summarize([pair[i] for pair in found]).mean if found else None for i in (0, 1))
    return Reach(target, len(found), len(arm.runs), units, seconds)


def why_not_comparable(arms: list[Arm]) -> str | None:
    """What two arms do not share of text, split, tokenizer, protocol and window; None where all is shared."""
    for arm in arms[1:]:
        first, other = arms[0].protocol, arm.protocol
        for key in first:
            if first[key] != other[key]:
                return (
                    f"{arms[0].name} and {arm.name} differ in {key}: {first[key]!r} and {other[key]!r}; "
                    "their losses do not measure the same thing"
                )
    return None


def compare(arms: list[Arm], part: Part = "validation") -> list[dict[str, Any]]:
    """A row an arm: its figures over the seeds, difference from the first arm, size and cost.

    The metric is the accuracy of classifiers and the loss of language models. Figures are of the weights chosen
    by validation loss, "last" is the metric of the last ones; "difference" pairs the seeds that an arm shares
    with the first.
    """
    rows = []
    metric: Metric = "accuracy" if arms[0].figures("accuracy", "best", part) else "loss"
    baseline = arms[0].figures(metric, "best", part)
    for index, arm in enumerate(arms):
        best, last = arm.figures(metric, "best", part), arm.figures(metric, "last", part)
        if not best:
            raise InputError(f"{arm.name} has no {part} part that was measured; see data.test and evaluation.test")
        one = next(iter(arm.results.values()))
        difference = paired_difference(best, baseline) if index else None
        figures: dict[str, float | None] = {}
        for name in FIGURES:
            if found := list(arm.figures(name, "best", part).values()):
                summary = summarize(found)
                figures |= {name: summary.mean, f"{name}_deviation": summary.deviation}
        rows.append(
            {
                "arm": arm.name,
                "metric": metric,
                "n": len(best),
                "unfinished": arm.unfinished,
                "seeds": sorted(best),
                **figures,
                "last": summarize(list(last.values())).mean,
                "difference": None if difference is None else difference.mean,
                "interval": None if difference is None else difference.interval,
                "pairs": None if difference is None else difference.n,
                "parameters": one["parameters"],
                "unit": (unit := next(key for key in UNITS if key in one)),
                "units": one[unit],
                "flops": one["flops"],
                "seconds": summarize([result["seconds"] for result in arm.results.values()]).mean,
                "part": part,
                "protocol": arm.protocol.get("protocol"),
                "window": arm.protocol.get("window"),
            }
        )
    return rows
