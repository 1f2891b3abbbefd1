"""The results page: published figures beside ours, from the JSON of sweeps.

docs/results.toml says which sweeps stand beside which published figures. Sweeps that are at hand are read
and their tables kept in a JSON file beside the page, so that the page can be made again without the runs.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from kmixer.config import StrictConfig
from kmixer.errors import InputError
from kmixer.experiments.compare import (
    Arm,
    arms_of,
    compare,
    measured_parts,
    reach_of,
    read_arms,
    why_not_comparable,
    without_results,
)
from kmixer.experiments.learned import LEARNED, learned_table
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
from kmixer.files import read_json, read_json_object, read_toml, write_json, write_text
from kmixer.runs.run_folder import RunFolder


class ResultEntry(StrictConfig):
    """One section of the page."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9-]+$")]  # of its tables in the JSON file
    title: str
    published: str = ""  # what was published, by which protocol
    sweep: str | None = None  # folder of the sweep or the run, relative to the .toml file
    baseline: str | None = None  # another by the same protocol, whose rows come first
    reach: float | None = None  # a validation loss: when each arm had it
    denoise: str | None = None  # or what `kmixer task denoise --json` printed
    note: str = ""  # what does not reproduce, and why

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (self.sweep is None) == (self.denoise is None):
            raise ValueError(f"{self.name}: give one of sweep and denoise")
        return self


class ResultsConfig(StrictConfig):
    """What results.toml holds."""

    title: str
    introduction: str = ""
    result: Annotated[list[ResultEntry], Field(min_length=1)]


def write_results_page(file: Path, out: Path) -> list[str]:
    """Write the page and its JSON; returns the names of the entries whose sweeps were not at hand.

    Raises InputError where an entry has neither a sweep nor a table kept from before, and where the page would be
    written over something else.
    """
    if out.suffix != ".md":
        raise InputError(f"--out: got {out}; allowed: a Markdown page, NAME.md")
    if RunFolder(out.parent).exists() or (out.parent / SWEEP).is_file():
        raise InputError(f"--out: {out.parent} holds a run or a sweep; choose another folder for the page")
    config = ResultsConfig.parse(read_toml(file), source=str(file))
    data = out.with_suffix(".json")
    kept: dict[str, Any] = read_json_object(data) if data.exists() else {}
    missing, sections = [], [f"# {config.title}", config.introduction]
    for entry in config.result:
        source = file.parent / (entry.sweep or entry.denoise or "")
        if source.exists() and (entry.baseline is None or (file.parent / entry.baseline).exists()):
            kept[entry.name] = _measure(entry, file.parent) if entry.sweep else read_json(source)
        elif entry.name in kept:
            missing.append(entry.name)
        else:
            raise InputError(f"{file}: {entry.name}: there is no {source}, and {data} holds no table of it")
        sections += [f"## {entry.title}", f"Published: {entry.published}" if entry.published else ""]
        sections += _sweep_section(kept[entry.name]) if entry.sweep else _denoise_section(kept[entry.name])
        sections.append(entry.note)
    kept = {entry.name: kept[entry.name] for entry in config.result}
    write_json(data, kept)
    write_text(out, "\n\n".join(section for section in sections if section) + "\n")
    return missing


def _measure(entry: ResultEntry, parent: Path) -> dict[str, Any]:
    """All that the page says about one sweep or run."""
    assert entry.sweep is not None
    folder = parent / entry.sweep
    arms = read_arms([*([parent / entry.baseline] if entry.baseline else []), folder])
    if reason := why_not_comparable(arms):
        raise InputError(f"{entry.name}: {reason}")
    ours = arms_of([folder])
    runs = [run for arm in ours for run in arm.runs]
    if (folder / SWEEP).is_file():
        sweep = Sweep.read(folder)
        command, arm_settings = command_of(sweep), sweep.arms
    else:
        command, arm_settings = shlex.join(RunFolder(folder).environment()["command"]), {}
    device, threads, commits = (
        dict.fromkeys(value for run in runs for value in run.made_with(key)) for key in ("device", "threads", "commit")
    )
    tables = {part: compare(arms, part) for part in measured_parts(arms)}
    return {
        "command": command,
        "arms": arm_settings,
        "machine": ", ".join(device),
        "threads": " or ".join(threads),
        "minutes": sum(result["seconds"] for arm in ours for result in arm.results.values()) / 60,
        "commits": list(dict.fromkeys(_short(commit) for commit in commits)),
        "tables": tables,
        "without_results": without_results(arms),
        "protocols": [{"arm": arm.name, **_protocols(arm)} for arm in arms if arm.results],
        "learned": learned_table(arms),
        "reach": [] if entry.reach is None else describe_reach(tables["validation"], reach_of(arms, entry.reach)),
        "words": {arm.name: found for arm in arms if (found := _per_word(arm))},
    }


def _short(commit: str) -> str:
    """Ten digits of a commit, and whether the checkout was that commit."""
    digits, dirty, _ = commit.partition("-dirty")
    return digits[:10] + dirty


def _per_word(arm: Arm) -> float | None:
    """Mean perplexity a word of an arm whose tokens are pieces of words."""
    if arm.measures.get("tokenizer", {}).get("kind") not in ("bpe", "sentencepiece"):
        return None
    figures = arm.figures("perplexity_per_word", "best", "validation").values()
    return sum(figures) / len(figures) if figures else None


def _protocols(arm: Arm) -> dict[str, str]:
    """Losses of an arm's best weights by every protocol of text: mean and deviation over seeds."""
    measured: dict[str, list[float]] = {}
    for result in arm.results.values():
        for each in result["best"]["validation"]:
            if each["protocol"] == "examples":
                continue
            key = "one stream" if each["window"] is None else f"windows of {each['window']:,}"
            measured.setdefault(key, []).append(each["loss"])
    summaries = {key: summarize(losses) for key, losses in measured.items()}
    return {key: with_deviation(found.mean, found.deviation, 4) for key, found in summaries.items()}


def _sweep_section(found: dict[str, Any]) -> list[str]:
    lines = []
    for rows in found["tables"].values():
        lines += [markdown_table(*table(rows)), describe(rows)]
    lines += [f"- {line}" for line in found["without_results"]]
    keys = list(dict.fromkeys(key for row in found["protocols"] for key in row if key != "arm"))
    if len(keys) > 1:
        body = [(row["arm"], *(row.get(key, "") for key in keys)) for row in found["protocols"]]
        lines += ["The same weights by each protocol, validation part, nats a token:"]
        lines += [markdown_table(("arm", *keys), body)]
    if len(found["learned"][0]) > 1:
        heading, body = found["learned"]
        lines += [f"What was learned. {LEARNED}", markdown_table(tuple(heading), [tuple(line) for line in body])]
    lines += ["\n".join(f"- {line}" for line in found["reach"])] if found["reach"] else []
    if found["words"]:
        said = ", ".join(f"{name} {value:,.1f}" for name, value in found["words"].items())
        lines.append(f"Perplexity a word, which a perplexity a piece is not: {said}.")
    commits = ", ".join(found["commits"])
    lines.append(
        f"`{found['command']}`; {found['machine']}, {found['threads']} thread(s) a run, {found['minutes']:,.0f} "
        f"minutes in all; commit{'s' * (len(found['commits']) > 1)} {commits}."
    )
    changed = {name: settings for name, settings in found["arms"].items() if settings}
    if changed:
        lines.append(
            "\n".join(f"- `{name}`: {', '.join(f'`{s}`' for s in settings)}" for name, settings in changed.items())
        )
    return lines


def _denoise_section(rows: list[dict[str, Any]]) -> list[str]:
    seeds = ", ".join(map(str, rows[0]["seeds"]))
    return [
        markdown_table(DENOISE_HEAD, [denoise_cells(row) for row in rows]),
        f"`kmixer task denoise --seeds {rows[0]['n']}`, seeds {seeds}: corrupted positions of 1,024 validation "
        "sequences, the lowest loss of each run's evaluations. Differences in loss are from the first row, by seed.",
    ]
