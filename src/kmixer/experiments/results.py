"""The results page: published figures beside ours, from the JSON of sweeps.

docs/results.toml says which sweeps stand beside which published figures. Sweeps that are at hand are read
and their tables kept in a JSON file beside the page, so that the page can be made again without the runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from kmixer.config import StrictConfig
from kmixer.errors import InputError
from kmixer.experiments.sections import DenoiseSection, Section, SweepSection, measure_sweep
from kmixer.experiments.sweep import SWEEP
from kmixer.files import read_json, read_toml, write_json, write_text
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
    kept = _read_kept(data)
    missing, sections = [], [f"# {config.title}", config.introduction]
    for entry in config.result:
        source = file.parent / (entry.sweep or entry.denoise or "")
        if source.exists() and (entry.baseline is None or (file.parent / entry.baseline).exists()):
            kept[entry.name] = _measure(entry, file.parent)
        elif entry.name in kept:
            missing.append(entry.name)
        else:
            raise InputError(f"{file}: {entry.name}: there is no {source}, and {data} holds no table of it")
        sections += [f"## {entry.title}", f"Published: {entry.published}" if entry.published else ""]
        sections += [*kept[entry.name].page(), entry.note]
    write_json(data, {entry.name: kept[entry.name].to_json() for entry in config.result})
    write_text(out, "\n\n".join(section for section in sections if section) + "\n")
    return missing


def _read_kept(data: Path) -> dict[str, Section]:
    """The sections that the JSON file beside the page holds, by name; none where there is no file."""
    values = read_json(data) if data.is_file() else {}
    if not isinstance(values, dict):
        raise InputError(f"{data} is not a file of results; remove it, or choose another --out")
    kept: dict[str, Section] = {}
    for name, value in values.items():
        source = f"{data}: {name}"
        kept[name] = (
            DenoiseSection.read(value, source) if isinstance(value, list) else SweepSection.parse(value, source=source)
        )
    return kept


def _measure(entry: ResultEntry, parent: Path) -> Section:
    """All that the page says of one entry whose sweep, run or file is at hand."""
    if entry.denoise is not None:
        return DenoiseSection.read(read_json(parent / entry.denoise), str(parent / entry.denoise))
    assert entry.sweep is not None
    baseline = None if entry.baseline is None else parent / entry.baseline
    return measure_sweep(entry.name, parent / entry.sweep, baseline, entry.reach)
