"""Sections of the results page: what is kept of a sweep or of the denoising task, and how the page says it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any, Protocol

from pydantic import Field

from kmixer.config import StrictConfig
from kmixer.errors import InputError
from kmixer.experiments.arms import Arm, arms_of, read_arms
from kmixer.experiments.compare import compare, measured_parts, reach_of, why_not_comparable, without_results
from kmixer.experiments.learned import LEARNED, learned_table
from kmixer.experiments.rows import ComparedArm, DenoisedMixer
from kmixer.experiments.statistics import summarize
from kmixer.experiments.sweep import SWEEP, Sweep, command_of
from kmixer.experiments.tables import (
    DENOISE_HEAD,
    denoise_cells,
    describe,
    describe_reach,
    markdown_table,
    table,
    with_deviation,
)
from kmixer.runs.records import Part
from kmixer.runs.run_folder import RunFolder


class Section(Protocol):
    """What a section of the page is made of; kept in the JSON file beside it."""

    def page(self) -> list[str]:
        """Its paragraphs, in Markdown."""
        ...

    def to_json(self) -> Any:
        """Plain values, of which the same section can be read again."""
        ...


class DenoiseSection(StrictConfig):
    """What `kmixer task denoise --json` printed."""

    rows: list[DenoisedMixer] = Field(min_length=1)

    @classmethod
    def read(cls, rows: Any, source: str) -> DenoiseSection:
        """The section of these plain rows. Raises InputError where they are something else."""
        return cls.parse({"rows": rows}, source=source)

    def to_json(self) -> list[dict[str, Any]]:
        return [row.model_dump() for row in self.rows]

    def page(self) -> list[str]:
        seeds = ", ".join(map(str, self.rows[0].seeds))
        return [
            markdown_table(DENOISE_HEAD, [denoise_cells(row) for row in self.rows]),
            f"`kmixer task denoise --seeds {self.rows[0].n}`, seeds {seeds}: corrupted positions of 1,024 "
            "validation sequences, the lowest loss of each run's evaluations. Differences in loss are from the first "
            "row, by seed.",
        ]


class SweepSection(StrictConfig):
    """All that the page says about one sweep or run."""

    command: str  # that made it
    arms: dict[str, list[str]]  # settings of each arm of a sweep
    machine: str
    threads: str | int  # of a run; files kept of old hold a number
    minutes: float  # of all runs
    commits: list[str]
    tables: dict[Part, list[ComparedArm]]
    without_results: list[str]  # a line for each arm that has none
    protocols: list[dict[str, str]]  # of each arm: its name, and its losses by protocol
    learned: tuple[list[str], list[list[str]]] = Field(strict=False)  # headings, and a line per arm
    reach: list[str]  # a line per arm: when it had the loss of the entry
    words: dict[str, float]  # perplexity per word, of the arms whose tokens are pieces of words

    def to_json(self) -> dict[str, Any]:
        tables = {part: [row.to_json() for row in rows] for part, rows in self.tables.items()}
        return self.model_dump() | {"tables": tables}

    def page(self) -> list[str]:
        lines = []
        for rows in self.tables.values():
            lines += [markdown_table(*table(rows)), describe(rows)]
        lines += [f"- {line}" for line in self.without_results]
        keys = list(dict.fromkeys(key for row in self.protocols for key in row if key != "arm"))
        if len(keys) > 1:
            body = [(row["arm"], *(row.get(key, "") for key in keys)) for row in self.protocols]
            lines += ["The same weights by each protocol, validation part, nats per token:"]
            lines += [markdown_table(("arm", *keys), body)]
        headings, learned = self.learned
        if len(headings) > 1:
            lines += [f"What was learned. {LEARNED}"]
            lines += [markdown_table(tuple(headings), [tuple(line) for line in learned])]
        lines += ["\n".join(f"- {line}" for line in self.reach)] if self.reach else []
        if self.words:
            said = ", ".join(f"{name} {value:,.1f}" for name, value in self.words.items())
            lines.append(f"Perplexity per word, which a perplexity per piece is not: {said}.")
        lines.append(
            f"`{self.command}`; {self.machine}, {self.threads} thread(s) per run, {self.minutes:,.0f} "
            f"minutes in all; commit{'s' * (len(self.commits) > 1)} {', '.join(self.commits)}."
        )
        changed = {name: settings for name, settings in self.arms.items() if settings}
        if changed:
            lines.append(
                "\n".join(f"- `{name}`: {', '.join(f'`{s}`' for s in settings)}" for name, settings in changed.items())
            )
        return lines


def measure_sweep(name: str, folder: Path, baseline: Path | None, reach: float | None) -> SweepSection:
    """The section of a sweep or a run that is at hand.

    Args:
        name: of the entry, for errors.
        folder: of the sweep or run.
        baseline: of another by the same protocol, whose rows come first.
        reach: a validation loss in nats: the section says when each arm had it.
    """
    arms = read_arms([*([] if baseline is None else [baseline]), folder])
    if reason := why_not_comparable(arms):
        raise InputError(f"{name}: {reason}")
    ours = arms_of([folder])
    runs = [run for arm in ours for run in arm.ended]
    if (folder / SWEEP).is_file():
        sweep = Sweep.read(folder)
        command, arm_settings = command_of(sweep), sweep.arms
    else:
        command, arm_settings = shlex.join(RunFolder(folder).environment()["command"]), {}
    device, threads, commits = (
        dict.fromkeys(value for run in runs for value in run.made_with(key)) for key in ("device", "threads", "commit")
    )
    tables = {part: compare(arms, part) for part in measured_parts(arms)}
    headings, learned = learned_table(arms)
    return SweepSection(
        command=command,
        arms=arm_settings,
        machine=", ".join(device),
        threads=" or ".join(threads),
        minutes=sum(results.seconds for arm in ours for results in arm.results.values()) / 60,
        commits=list(dict.fromkeys(short_commit(commit) for commit in commits)),
        tables=tables,
        without_results=without_results(arms),
        protocols=[{"arm": arm.name, **_protocols(arm)} for arm in arms if arm.results],
        learned=(list(headings), [list(line) for line in learned]),
        reach=[] if reach is None else describe_reach(tables["validation"], reach_of(arms, reach)),
        words={arm.name: mean for arm in arms if arm.results and (mean := _per_word(arm))},
    )


def short_commit(commit: str) -> str:
    """Ten digits of a commit, and whether the checkout was that commit."""
    digits, dirty, _ = commit.partition("-dirty")
    return digits[:10] + dirty


def _per_word(arm: Arm) -> float | None:
    """Mean perplexity per word of an arm whose tokens are pieces of words."""
    if arm.measures.get("tokenizer", {}).get("kind") not in ("bpe", "sentencepiece"):
        return None
    figures = arm.figures("perplexity_per_word", "best", "validation").values()
    return sum(figures) / len(figures) if figures else None


def _protocols(arm: Arm) -> dict[str, str]:
    """Losses of an arm's best weights by every protocol of text: mean and deviation over seeds."""
    measured: dict[str, list[float]] = {}
    for results in arm.results.values():
        for one in results.best.validation:
            if one.protocol == "examples":
                continue
            key = "one stream" if one.window is None else f"windows of {one.window:,}"
            measured.setdefault(key, []).append(one.loss)
    summaries = {key: summarize(losses) for key, losses in measured.items()}
    return {key: with_deviation(summary.mean, summary.deviation, 4) for key, summary in summaries.items()}
