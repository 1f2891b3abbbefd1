"""Rows of `compare` as the terminal, Markdown pages and the report show them."""

from __future__ import annotations

from collections.abc import Sequence

from kmixer.experiments.compare import Reach
from kmixer.experiments.rows import ComparedArm, DenoisedMixer, Metric, RecallingArm
from kmixer.runs.records import Figure

# Of the columns between arm and cost, by metric: heading, figure of the row, digits.
FIGURES: dict[Metric, tuple[tuple[str, Figure, int], ...]] = {
    "loss": (("loss", "loss", 4), ("perplexity", "perplexity", 3), ("bits/byte", "bits_per_byte", 4)),
    "bits_per_byte": (("bits/byte", "bits_per_byte", 4), ("loss", "loss", 4)),
    "accuracy": (("accuracy", "accuracy", 4), ("loss", "loss", 4)),
}
# Training of less than this is counted in full.
MANY = 10_000_000


def head(rows: list[ComparedArm]) -> tuple[str, ...]:
    """The headings of the columns of `cells`."""
    names = (name for name, _, _ in FIGURES[rows[0].metric])
    return (
        "arm",
        "n",
        *names,
        "last",
        "difference",
        "95 % interval",
        "parameters",
        rows[0].unit,
        "FLOPs",
        "minutes",
    )


def cells(row: ComparedArm) -> tuple[str, ...]:
    """One row, a text for every column."""
    difference, interval = difference_cells(row)
    if row.pairs and row.pairs < row.n:
        difference += f" ({row.pairs} of {row.n})"
    return (
        row.arm,
        f"{row.n}" + (f" of {row.n + row.unfinished}" if row.unfinished else ""),
        *(with_deviation(row.mean(key), row.deviation(key), digits) for _, key, digits in FIGURES[row.metric]),
        f"{row.last:.4f}",
        difference,
        interval,
        f"{row.parameters:,}",
        amount(row.units),
        f"{row.flops:.2e}",
        f"{row.seconds / 60:.1f}",
    )


def table(rows: list[ComparedArm]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Headings and cells, as `text_table` and `markdown_table` take them."""
    return head(rows), [cells(row) for row in rows]


def difference_cells(row: ComparedArm | DenoisedMixer | RecallingArm) -> tuple[str, str]:
    """The difference from the first row and its interval."""
    difference, interval = row.difference, row.interval
    return (
        "" if difference is None else f"{difference:+.4f}",
        "" if interval is None else f"{interval[0]:+.4f} to {interval[1]:+.4f}",
    )


def is_better(row: ComparedArm) -> bool | None:
    """Whether an arm is better than the first; None where its interval holds zero, or there is none."""
    if row.interval is None or row.interval[0] <= 0 <= row.interval[1]:
        return None
    return (row.interval[0] > 0) == (row.metric == "accuracy")


def headline(rows: list[ComparedArm]) -> str:
    """The best arm and how it stands to the first, in a sentence or two."""
    metric = rows[0].metric
    name_of = metric.replace("_", " ")
    measured = [(mean, row) for row in rows if (mean := row.mean(metric)) is not None]
    _, best = (max if metric == "accuracy" else min)(measured, key=lambda pair: pair[0])
    said = "; ".join(
        f"{name} {with_deviation(best.mean(key), best.deviation(key), digits)}" for name, key, digits in FIGURES[metric]
    )
    text = f"{best.arm} has the best {best.part} {name_of}: {said}, over {best.n} seed{'s' * (best.n > 1)}."
    if best.interval is not None:
        low, high = best.interval
        text += f" Against {rows[0].arm}: {best.difference:+.4f}, 95 % interval {low:+.4f} to {high:+.4f}."
    elif best.n == 1 and len(rows) > 1:
        text += " One seed says nothing about the spread."
    return text


def describe(rows: list[ComparedArm]) -> str:
    """What the figures of a table are: part, protocol, and which weights."""
    first = rows[0]
    chosen = "on the part they are reported on" if first.part == "validation" else "on the validation part"
    protocols = list(dict.fromkeys((row.protocol, row.window) for row in rows))
    if first.metric == "accuracy":
        measured = f"Accuracy and cross-entropy in nats on the {first.part} part"
    else:
        what = "Cross-entropy in nats per token"
        if first.metric == "bits_per_byte":
            what = "Bits per byte, because the tokenizers differ, and cross-entropy in nats per token"
        said = " and ".join(_protocol(*protocol) for protocol in protocols)
        measured = f"{what} on the {first.part} part, {said}"
        measured += " (not the same for all rows)" if len(protocols) > 1 else ""
    last = first.metric.replace("_", " ")
    return (
        f"{measured}; mean +- deviation over n seeds. "
        f"Weights with the lowest validation loss, so chosen {chosen}; last: {last} of the last step. "
        "Differences are from the first row, over the seeds both have (how many, where not all); minutes of one run."
    )


def _protocol(protocol: str, window: int | None) -> str:
    return f"windows of {window:,}, state reset" if protocol == "windows" else "one stream, state carried"


def describe_reach(rows: list[ComparedArm], reaches: list[Reach]) -> list[str]:
    """A line per arm: when it reached a loss, and what that is of the training of the first arm."""
    return [_reached(row.arm, row.unit, reach, reaches[0]) for row, reach in zip(rows, reaches, strict=True)]


def _reached(name: str, unit: str, reach: Reach, baseline: Reach) -> str:
    if reach.units is None or reach.seconds is None:
        return f"{name}: {reach.target} not reached"
    runs = f"{reach.seeds} of {reach.of} run{'s' * (reach.of > 1)}"
    text = f"{name}: {reach.target} reached by {runs} after {amount(reach.units)} {unit}"
    text += f", {reach.seconds / 60:,.1f} minutes"
    if reach is not baseline and baseline.units and baseline.seconds:
        text += f" ({reach.units / baseline.units:.2f} and {reach.seconds / baseline.seconds:.2f} of the first)"
    return text


# Headings of `denoise_cells`.
DENOISE_HEAD = ("mixer", "parameters", "n", "loss, nats", "accuracy", "difference", "95 % interval")


def denoise_cells(row: DenoisedMixer) -> tuple[str, ...]:
    """One mixer of the denoising task."""
    return (
        row.mixer,
        f"{row.parameters:,}",
        str(row.n),
        with_deviation(row.loss, row.loss_deviation, 3),
        with_deviation(row.accuracy, row.accuracy_deviation, 3),
        *difference_cells(row),
    )


# Headings of `recall_cells`.
RECALL_HEAD = (
    "pairs",
    "arm",
    "parameters",
    "n",
    "loss, nats",
    "accuracy",
    "steps to 99 %",
    "difference",
    "95 % interval",
)


def recall_cells(row: RecallingArm) -> tuple[str, ...]:
    """One arm of the recall task."""
    reached = [str(steps) if steps is not None else "-" for steps in row.reached]
    return (
        f"{row.pairs} of {row.keys}",
        row.arm,
        f"{row.parameters:,}",
        str(row.n),
        with_deviation(row.loss, row.loss_deviation, 3),
        with_deviation(row.accuracy, row.accuracy_deviation, 4),
        " ".join(reached),
        *difference_cells(row),
    )


def amount(units: float) -> str:
    """Tokens, images or sequences."""
    return f"{units / 1e6:,.1f} M" if units >= MANY else f"{units:,.0f}"


def with_deviation(mean: float | None, deviation: float | None, digits: int) -> str:
    """Nothing where there is no mean."""
    return "" if mean is None else f"{mean:,.{digits}f}" + ("" if deviation is None else f" +- {deviation:,.{digits}f}")


def text_table(head: tuple[str, ...], body: Sequence[tuple[str, ...]]) -> str:
    """A table of texts in aligned columns."""
    lines = [head, *body]
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def markdown_table(head: tuple[str, ...], body: Sequence[tuple[str, ...]]) -> str:
    """A table of texts."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ("---",) * len(head), *body))
