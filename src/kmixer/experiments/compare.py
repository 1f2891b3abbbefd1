"""Runs and sweeps side by side: what each arm gave over its seeds, and how it differs from the first."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from kmixer.errors import InputError
from kmixer.experiments.statistics import paired_difference, summarize
from kmixer.experiments.sweep import runs_by_arm
from kmixer.runs.run_folder import RESULTS, RunFolder

Weights = Literal["best", "last"]
Part = Literal["validation", "test"]
Metric = Literal["loss", "bits_per_byte", "accuracy"]
# A window length, or "stream"; None is what the recipe chooses its weights by.
Protocol = int | Literal["stream"] | None
UNITS = ("tokens", "images", "sequences")
# What is summarised over the seeds, of what was measured.
FIGURES = ("loss", "perplexity", "bits_per_byte", "accuracy")


@dataclass(frozen=True)
class Arm:
    """Runs that differ in their seed alone."""

    name: str
    results: dict[int, dict[str, Any]]  # results.json by seed
    unfinished: int  # runs that have not ended
    diverged: int = 0  # of these, the ones whose loss was not finite
    measures: dict[str, Any] = field(default_factory=dict)  # what two arms must share to be compared
    runs: list[RunFolder] = field(default_factory=list)  # those that have ended

    def entries(self, weights: Weights, part: Part, protocol: Protocol = None) -> dict[int, dict[str, Any]]:
        """What was measured of a part, by seed: by a protocol, or by the one that the recipe chooses weights by."""
        found = {}
        for seed, result in self.results.items():
            entry = next((each for each in result[weights].get(part, []) if _is_of(each, protocol)), None)
            if entry is not None:
                found[seed] = entry
        return found

    def figures(self, name: str, weights: Weights, part: Part, protocol: Protocol = None) -> dict[int, float]:
        """A figure of these, "loss" or "accuracy" or another, by seed, where it was measured."""
        found = self.entries(weights, part, protocol)
        return {seed: entry[name] for seed, entry in found.items() if entry.get(name) is not None}

    @property
    def unit(self) -> str:
        """What its training counts: tokens, images or sequences."""
        return next(key for key in UNITS if key in next(iter(self.results.values())))


def _is_of(entry: dict[str, Any], protocol: Protocol) -> bool:
    if protocol is None:
        return True
    return bool(entry["protocol"] == "stream" if protocol == "stream" else entry.get("window") == protocol)


def read_arms(paths: list[Path]) -> list[Arm]:
    """The arms of run folders and sweeps, in the order given.

    Raises InputError where a path is neither, or none of its runs has ended.
    """
    for path in paths:
        if not any((run / RESULTS).is_file() for _, runs in runs_by_arm([path]) for run in runs):
            raise InputError(
                f"{path}: none of its runs has ended; go on with kmixer train --resume, or the same kmixer sweep"
            )
    return arms_of(paths)


def arms_of(paths: list[Path]) -> list[Arm]:
    """Every arm of run folders and sweeps, ended or not. Raises InputError where a path is neither."""
    arms = []
    for name, folders in runs_by_arm(paths):
        runs = [RunFolder(folder) for folder in folders]
        ended = [(run, results) for run in runs if (results := run.results()) is not None]
        arms.append(
            Arm(
                name,
                {results["seed"]: results for _, results in ended},
                unfinished=len(runs) - len(ended),
                diverged=sum(run.diverged() for run in runs),
                measures=_measures(ended[0][0]) if ended else {},
                runs=[run for run, _ in ended],
            )
        )
    return arms


def _measures(run: RunFolder) -> dict[str, Any]:
    return {"corpus": run.environment()["corpus_sha256"], **run.read_recipe().measures()}


@dataclass(frozen=True)
class Reach:
    """When the runs of an arm first measured a validation loss at or below a target."""

    target: float  # nats
    seeds: int  # runs that reached it
    of: int
    units: float | None  # trained until then, mean over those runs; None where there are none
    seconds: float | None


def reach_of(arms: list[Arm], target: float) -> list[Reach]:
    """How much training each arm with results needs for a validation loss."""
    return [_reach(arm, target) for arm in arms if arm.results]


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


def why_not_comparable(arms: list[Arm], protocol: Protocol = None) -> str | None:
    """What two arms do not share of text, split, protocol and window; None where all is shared.

    Tokenizers may differ, since bits a byte are compared then. A protocol that is named is that of all arms.
    Raises InputError for arms of different tasks, which share no figure.
    """
    ended = [arm for arm in arms if arm.results]
    aside = {"tokenizer"} | ({"protocol", "window"} if protocol is not None else set())
    for arm in ended[1:]:
        first, other = ended[0].measures, arm.measures
        if ended[0].unit != arm.unit:
            raise InputError(
                f"{ended[0].name} counts {ended[0].unit} and {arm.name} {arm.unit}: they share no figure to compare"
            )
        for key in first:
            if key not in aside and first[key] != other[key]:
                return (
                    f"{ended[0].name} and {arm.name} differ in {key}: {first[key]!r} and {other[key]!r}; "
                    "their losses do not measure the same thing"
                )
    return None


def without_results(arms: list[Arm]) -> list[str]:
    """A line for every arm that has no run that ended."""
    lines = []
    for arm in arms:
        if not arm.results:
            left = arm.unfinished - arm.diverged
            said = [f"{arm.diverged} diverged"] * bool(arm.diverged) + [f"{left} not ended"] * bool(left)
            lines.append(f"{arm.name} has no result: of {arm.unfinished} runs {', '.join(said)}")
    if lines and not arms[0].results:
        lines.append(f"differences would be from {arms[0].name}, so there are none")
    return lines


def measured_parts(arms: list[Arm]) -> list[Part]:
    """The held-out parts on which every run that ended was measured."""
    results = [result for arm in arms for result in arm.results.values()]
    return ["validation", "test"] if results and all("test" in each["best"] for each in results) else ["validation"]


def metric_of(arms: list[Arm]) -> Metric:
    """Accuracy for classifiers, loss for language models; bits a byte where their tokens are not the same."""
    if arms[0].unit != "tokens":
        return "accuracy"
    tokenizers = [arm.measures["tokenizer"] for arm in arms]
    return "loss" if all(each == tokenizers[0] for each in tokenizers) else "bits_per_byte"


def compare(arms: list[Arm], part: Part = "validation", protocol: Protocol = None) -> list[dict[str, Any]]:
    """A row for each arm with results: its figures over the seeds, difference from the first arm, size and cost.

    The metric is that of `metric_of`. Figures are of the weights chosen by validation loss, "last" is the metric
    of the last ones; "difference" pairs the seeds that an arm shares with the first.

    Raises InputError where an arm was not measured on this part, or by this protocol.
    """
    rows = []
    first, ended = arms[0], [arm for arm in arms if arm.results]
    metric = metric_of(ended)
    baseline = first.figures(metric, "best", part, protocol)
    for arm in ended:
        best, last = (arm.figures(metric, weights, part, protocol) for weights in ("best", "last"))
        if not best:
            if arm.figures(metric, "best", part):
                raise InputError(f"{arm.name} was not measured by this protocol; its results.json says by which it was")
            raise InputError(f"{arm.name} has no {part} part that was measured; see data.test and evaluation.test")
        entry = next(iter(arm.entries("best", part, protocol).values()))
        one = next(iter(arm.results.values()))
        difference = paired_difference(best, baseline) if arm is not first else None
        figures: dict[str, float | None] = {}
        for name in (figure for figure in FIGURES if figure in entry):
            found = list(arm.figures(name, "best", part, protocol).values())
            # Of every run or none: a perplexity can be too large for a number.
            summary = summarize(found) if len(found) == len(best) else None
            figures[name] = None if summary is None else summary.mean
            figures[f"{name}_deviation"] = None if summary is None else summary.deviation
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
                "unit": arm.unit,
                "units": one[arm.unit],
                "flops": one["flops"],
                "seconds": summarize([result["seconds"] for result in arm.results.values()]).mean,
                "part": part,
                "protocol": entry["protocol"],
                "window": entry.get("window"),
            }
        )
    return rows
