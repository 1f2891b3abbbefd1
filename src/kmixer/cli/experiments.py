"""kmixer sweep and compare: many runs, and what they say together."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer

from kmixer.cli.options import Cpu, DataDir, Json, Settings
from kmixer.errors import InputError, shown
from kmixer.experiments.arms import read_arms
from kmixer.experiments.compare import compare, reach_of, why_not_comparable, without_results
from kmixer.experiments.learned import LEARNED, learned_table
from kmixer.experiments.results import write_results_page
from kmixer.experiments.sweep import (
    ABLATIONS,
    SEED,
    Sweep,
    arms_of_grid,
    check_number_of_runs,
    load_ablation,
    read_ablation_file,
)
from kmixer.experiments.tables import describe, describe_reach, markdown_table, table, text_table
from kmixer.experiments.workers import log_of, run_sweep
from kmixer.runs.recipe import load_recipe
from kmixer.runs.records import Protocol
from kmixer.runs.run_folder import RECIPE


def sweep(
    recipe: Annotated[
        str | None,
        typer.Argument(metavar="[RECIPE]", help="A recipe or an ablation (see kmixer recipes), or a .toml file."),
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(help="How many seeds, from the recipe's on, or a list: 42,69,420 (of one: 42,).")
    ] = None,
    grid: Annotated[
        list[str] | None, typer.Option(metavar="KEY=A,B", help="Try these values of a key; may be given again.")
    ] = None,
    settings: Settings = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the sweep; default runs/RECIPE-sweep.")] = None,
    workers: Annotated[int, typer.Option(min=1, max=1024, help="Runs at a time.")] = 1,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of a run; default: all, shared evenly.")] = None,
    begin_from: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="RUN",
            help="Begin every run with the weights of this one, see kmixer train; {seed} in it is the seed of the run.",
        ),
    ] = None,
    data_dir: DataDir = None,
    cpu: Cpu = False,
) -> None:
    """Train a recipe with several seeds and settings; the same command goes on where it was stopped.

    Example: kmixer sweep shakespeare-quick --seeds 3 --grid model.rank=2,8
    """
    from kmixer.cli.progress import SweepReporter

    planned = plan(recipe, seeds, grid or [], settings or [], begin_from)
    name = _name_of(planned)
    folder = out or Path("runs") / f"{name}-sweep"
    options = [*(("--data-dir", str(data_dir)) if data_dir else ()), *(("--cpu",) if cpu else ())]
    with SweepReporter(folder) as reporter:
        runs = run_sweep(
            folder,
            planned,
            workers=workers,
            threads=threads or max(1, torch.get_num_threads() // workers),
            options=options,
            report=reporter.report,
        )
    if any(run.status == "waiting" for run in runs):
        print("interrupted; saved. The same command goes on")
        raise typer.Exit(130)
    for run in runs:
        if run.status in ("failed", "diverged"):
            print(f"{run.arm}, seed {run.seed}: {run.status}; see {log_of(run)}")
    if any(run.status == "finished" for run in runs):
        arms = read_arms([folder])
        rows = compare(arms)
        print(text_table(*table(rows)), describe(rows), *without_results(arms), sep="\n")
    if any(run.status == "failed" for run in runs):
        raise typer.Exit(1)


def compare_runs(
    paths: Annotated[list[Path], typer.Argument(help="Run folders and sweeps; the first is the baseline.")],
    part: Annotated[Literal["validation", "test"], typer.Option(help="The held-out part.")] = "validation",
    protocol: Annotated[
        Literal["stream"] | None, typer.Option(help="Losses of one stream instead of the recipe's protocol.")
    ] = None,
    window: Annotated[int | None, typer.Option(help="Losses at this window: the recipe's, 256 or 1024.")] = None,
    anyway: Annotated[bool, typer.Option("--anyway", help="Compare different data or protocols.")] = False,
    as_json: Json = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
    target: Annotated[
        float | None, typer.Option("--reach", help="Say too when this validation loss was reached.")
    ] = None,
    learned: Annotated[bool, typer.Option("--learned", help="Say too what was learned: shares, decays, eta.")] = False,
) -> None:
    """Compare runs and sweeps: mean and deviation over seeds, difference from the first with its 95 % interval.

    Example: kmixer compare runs/a-sweep runs/b-sweep
    """
    if as_json and markdown:
        raise InputError("--json and --markdown are two forms of output; give one of them")
    if protocol and window:
        raise InputError("--window goes with windows, and --protocol stream has none; give one of them")
    chosen: Protocol = protocol or window
    arms = read_arms(paths)
    reason = why_not_comparable(arms, chosen)
    if reason and not anyway:
        raise InputError(f"{reason} (--anyway compares them all the same)")
    rows = compare(arms, part, chosen)
    reached = None if target is None else reach_of(arms, target)
    heading, body = learned_table(arms) if learned else ((), [])
    if as_json:
        printed = [row.to_json() for row in rows]
        for line, reach in zip(printed, reached or (), strict=False):
            line["reach"] = asdict(reach)
        for line, cells in zip(printed, body, strict=False):
            line["learned"] = dict(zip(heading[1:], cells[1:], strict=True))
        print(json.dumps(printed, indent=2))
        return
    notes = [*([f"not comparable: {reason}"] if reason else []), *without_results(arms)]
    notes += describe_reach(rows, reached) if reached is not None else []
    if markdown:
        parts = [markdown_table(*table(rows)), describe(rows)]
        parts += [f"- {note}" for note in notes]
        parts += [markdown_table(heading, body), LEARNED] if learned else []
        print("\n\n".join(parts))
        return
    print(text_table(*table(rows)), describe(rows), *notes, sep="\n")
    if learned:
        print(text_table(heading, body), LEARNED, sep="\n")


def results(
    file: Annotated[Path, typer.Argument(help="A .toml file that says which sweeps stand beside which figures.")],
    out: Annotated[Path, typer.Option(help="The Markdown page; its tables are kept in a .json file beside it.")],
) -> None:
    """Write a page of published figures beside ours, from finished sweeps.

    Example: kmixer results docs/results.toml --out docs/results.md
    """
    for name in write_results_page(file, out):
        print(f"{name}: its sweep is not here; the table kept from before was used")
    print(out)


def _name_of(sweep: Sweep) -> str:
    """What a sweep is called after: its recipe, or the run that it goes on from."""
    if sweep.begin_from is not None and sweep.begins_with_own_recipe:
        return f"{Path(sweep.begin_from).name.replace(SEED, 'all')}-continued"
    return Path(sweep.recipe).stem if sweep.recipe.endswith(".toml") else sweep.recipe.rpartition("/")[2]


def plan(
    recipe: str | None, seeds: str | None, grid: list[str], settings: list[str], begin_from: str | None = None
) -> Sweep:
    """The sweep that a command line asks for."""
    if recipe is None:
        if begin_from is None:
            raise InputError("what to train: got neither RECIPE nor --from RUN; give one of them (see kmixer recipes)")
        recipe = str(Path(begin_from) / RECIPE)
    ablation = None
    if recipe.startswith(ABLATIONS):
        ablation = load_ablation(recipe)
    elif recipe.endswith(".toml") and SEED not in recipe:
        ablation = read_ablation_file(Path(recipe))
    if ablation is None:
        if SEED in recipe:
            if "," not in (seeds or ""):
                raise InputError(f"--from {begin_from}: it has one run a seed; list them, for example --seeds 1,2,3")
            first = 0
        else:
            first = load_recipe(recipe, settings).training.seed
        chosen = _parse_seeds(seeds or "1", first)
        parsed = [_parse_grid(text) for text in grid]
        if repeated := {key for key, _ in parsed if [other for other, _ in parsed].count(key) > 1}:
            raise InputError(f"--grid: got {', '.join(sorted(repeated))} more than once; give all its values at once")
        arms = arms_of_grid(dict(parsed))
        values = {"recipe": recipe, "settings": settings, "arms": arms, "seeds": chosen, "begin_from": begin_from}
        return Sweep.parse(values, source="kmixer sweep")
    if grid:
        raise InputError(f"--grid: the arms of {recipe} are fixed; give --grid with a recipe")
    chosen = _parse_seeds(seeds, ablation.seeds[0]) if seeds else ablation.seeds
    values = ablation.model_dump() | {"settings": ablation.settings + settings, "seeds": chosen}
    if begin_from is not None:
        values["begin_from"] = begin_from
    return Sweep.parse(values, source="kmixer sweep")


def _parse_seeds(text: str, first: int) -> list[int]:
    try:
        seeds = [int(part) for part in text.removesuffix(",").split(",")]  # "5," is the list of one
    except ValueError:
        raise InputError(
            f"--seeds: got {shown(text)}; allowed: a number of seeds, or a list such as 42,69,420 (of one: 42,)"
        ) from None
    if len(seeds) == 1 and "," not in text:
        if seeds[0] < 1:
            raise InputError(f"--seeds: got {seeds[0]}; allowed: 1 or more")
        check_number_of_runs(seeds[0])
        return list(range(first, first + seeds[0]))
    return seeds


def _parse_grid(text: str) -> tuple[str, list[str]]:
    key, equals, values = text.partition("=")
    parts = [value.strip() for value in re.split(r",(?![^\[]*\])", values)]  # commas inside brackets separate nothing
    if not equals or not all(parts):
        raise InputError(f"--grid {text}: write it as key=a,b, for example model.rank=2,8")
    return key.strip(), parts
