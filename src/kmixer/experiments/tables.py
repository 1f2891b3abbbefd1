"""Rows of `compare` as the terminal, Markdown pages and the report show them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

HEAD = ("arm", "n", "loss", "perplexity", "bits/byte", "last", "difference", "95 % interval",
        "parameters", "tokens", "FLOPs", "minutes")  # fmt: skip


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """One row, a text for every column of HEAD."""
    interval = row["interval"]
    return (
        row["arm"],
        f"{row['n']}" + (f" of {row['n'] + row['unfinished']}" if row["unfinished"] else ""),
        with_deviation(row["loss"], row["deviation"], 4),
        with_deviation(row["perplexity"], row["perplexity_deviation"], 3),
        f"{row['bits_per_byte']:.4f}",
        f"{row['last']:.4f}",
        "" if row["difference"] is None else f"{row['difference']:+.4f}",
        "" if interval is None else f"{interval[0]:+.4f} to {interval[1]:+.4f}",
        f"{row['parameters']:,}",
        f"{row['tokens'] / 1e6:,.1f} M",
        f"{row['flops']:.2e}",
        f"{row['seconds'] / 60:.1f}",
    )


def describe(rows: list[dict[str, Any]]) -> str:
    """What the figures of a table are: part, protocol, and which weights."""
    first = rows[0]
    protocol = f"windows of {first['window']}, state reset" if first["protocol"] == "windows" else "one stream"
    chosen = "on the part they are reported on" if first["part"] == "validation" else "on the validation part"
    return (
        f"Cross-entropy in nats a token on the {first['part']} part, {protocol}; mean +- deviation over n seeds. "
        f"Weights with the lowest validation loss, so chosen {chosen}; last: of the last step. Differences are from "
        "the first row, over the seeds both have; minutes of one run."
    )


def with_deviation(mean: float, deviation: float | None, digits: int) -> str:
    return f"{mean:.{digits}f}" + ("" if deviation is None else f" +- {deviation:.{digits}f}")


def text_table(rows: list[dict[str, Any]]) -> str:
    """Aligned columns, and what they are."""
    lines = [HEAD, *(cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEAD))]
    text = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join([*text, describe(rows)])


def markdown_table(head: tuple[str, ...], body: Sequence[tuple[str, ...]]) -> str:
    """A table of texts."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ("---",) * len(head), *body))
