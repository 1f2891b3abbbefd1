"""Arms side by side: what each gave over its seeds, and how it differs from the first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kmixer.errors import InputError
from kmixer.experiments.arms import Arm
from kmixer.experiments.rows import ComparedArm, Metric
from kmixer.experiments.statistics import paired_difference, summarize
from kmixer.runs.records import Figure, Part, Protocol

# What is summarised over the seeds, of what was measured.
FIGURES: tuple[Figure, ...] = ("loss", "perplexity", "bits_per_byte", "accuracy")


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
    first = []
    for run in arm.ended:
        per_step = run.read_recipe().units_per_step
        line = next((line for line in arm.evaluations(run) if line.loss <= target), None)
        if line is not None:
            first.append((line.step * per_step, line.seconds))
    units, seconds = (summarize([pair[i] for pair in first]).mean if first else None for i in (0, 1))
    return Reach(target, len(first), len(arm.ended), units, seconds)


def why_not_comparable(arms: list[Arm], protocol: Protocol = None) -> str | None:
    """What two arms do not share of text, split, protocol and window; None where all is shared.

    Tokenizers may differ, since bits per byte are compared then. A protocol that is named is that of all arms.
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
    return ["validation", "test"] if results and all(result.best.test for result in results) else ["validation"]


def metric_of(arms: list[Arm]) -> Metric:
    """Accuracy for classifiers, loss for language models; bits per byte where their tokens are not the same."""
    if arms[0].unit != "tokens":
        return "accuracy"
    tokenizers = [arm.measures["tokenizer"] for arm in arms]
    return "loss" if all(tokenizer == tokenizers[0] for tokenizer in tokenizers) else "bits_per_byte"


def compare(arms: list[Arm], part: Part = "validation", protocol: Protocol = None) -> list[ComparedArm]:
    """A row for each arm with results: its figures over the seeds, difference from the first arm, size and cost.

    The metric is that of `metric_of`. Figures are of the weights chosen by validation loss, "last" is the metric
    of the last ones; "difference" pairs the seeds that an arm shares with the first.

    Raises InputError where an arm was not measured on this part, or by this protocol.
    """
    first, ended = arms[0], [arm for arm in arms if arm.results]
    metric = metric_of(ended)
    baseline = first.figures(metric, "best", part, protocol)
    return [_row(arm, None if arm is first else baseline, metric, part, protocol) for arm in ended]


def _row(arm: Arm, baseline: dict[int, float] | None, metric: Metric, part: Part, protocol: Protocol) -> ComparedArm:
    best, last = (arm.figures(metric, weights, part, protocol) for weights in ("best", "last"))
    if not best:
        if arm.figures(metric, "best", part):
            raise InputError(f"{arm.name} was not measured by this protocol; its results.json says by which it was")
        raise InputError(f"{arm.name} has no {part} part that was measured; see data.test and evaluation.test")
    measured = next(iter(arm.measurements("best", part, protocol).values()))
    one = next(iter(arm.results.values()))
    difference = None if baseline is None else paired_difference(best, baseline)
    figures: dict[str, Any] = {}
    for name in (figure for figure in FIGURES if measured.has(figure)):
        values = list(arm.figures(name, "best", part, protocol).values())
        # Of every run or none: a perplexity can be too large for a number.
        summary = summarize(values) if len(values) == len(best) else None
        figures[name] = None if summary is None else summary.mean
        figures[f"{name}_deviation"] = None if summary is None else summary.deviation
    return ComparedArm(
        arm=arm.name,
        metric=metric,
        n=len(best),
        unfinished=arm.unfinished,
        seeds=sorted(best),
        **figures,
        last=summarize(list(last.values())).mean,
        difference=None if difference is None else difference.mean,
        interval=None if difference is None else difference.interval,
        pairs=None if difference is None else difference.n,
        parameters=one.parameters,
        unit=arm.unit,
        units=one.units,
        flops=one.flops,
        seconds=summarize([results.seconds for results in arm.results.values()]).mean,
        part=part,
        protocol=measured.protocol,
        window=measured.window,
    )
