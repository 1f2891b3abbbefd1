"""A sweep: one recipe in several arms, each with several seeds; a run folder for each.

SWEEP/sweep.json            what the sweep is: recipe, settings of all runs, arms, seeds
SWEEP/ARM/seed-S            a run folder

Every run is a process of its own, `kmixer train`. What has ended is not repeated, what was
interrupted goes on from its last checkpoint: a sweep that was killed ends with the same table.
"""

from __future__ import annotations

import itertools
import math
import shlex
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from kmixer.config import StrictConfig
from kmixer.errors import InputError
from kmixer.files import is_regular_file, parse_toml, plain_text, read_json, read_toml
from kmixer.runs.recipe import load_recipe
from kmixer.runs.run_folder import RECIPE, RunFolder

SWEEP = "sweep.json"
LOCK = ".lock"
ABLATIONS = "ablations/"
# In the path of a run that a sweep begins from: its own seed, so that every run goes on from that of its seed.
SEED = "{seed}"

Status = Literal["waiting", "running", "finished", "diverged", "failed"]
Seed = Annotated[int, Field(ge=0, lt=1 << 63)]
# Of one sweep: what a mistyped number asks for is known before any of it is built.
MAX_RUNS = 10_000
ArmName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9=_.,+-]*$")]


class Sweep(StrictConfig):
    """What sweep.json holds, and a file of ablations: a recipe and what is changed in it."""

    description: str = ""
    recipe: str  # a packaged name, or the path of a .toml file
    settings: list[str] = Field(default_factory=list)  # key=value, of every run
    arms: dict[ArmName, list[str]]  # name to further settings; the first is the baseline
    seeds: Annotated[list[Seed], Field(min_length=1)]
    begin_from: str | None = None  # the run whose weights every run begins with; {seed} in it is the run's seed

    def recipe_of(self, seed: int) -> str:
        """The recipe of the runs of a seed."""
        return self.recipe.replace(SEED, str(seed)) if self.begins_with_own_recipe else self.recipe

    def begin_from_of(self, seed: int) -> str | None:
        """The run whose weights the runs of a seed begin with."""
        return None if self.begin_from is None else self.begin_from.replace(SEED, str(seed))

    @property
    def begins_with_own_recipe(self) -> bool:
        """Whether the recipe is that of the runs which it begins from."""
        return self.begin_from is not None and self.recipe == str(Path(self.begin_from) / RECIPE)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if not self.arms:
            raise ValueError("arms: got none; give one or more")
        check_number_of_runs(len(self.arms) * len(self.seeds))
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: got {self.seeds}; every seed once")
        return self

    @classmethod
    def read(cls, folder: Path) -> Sweep:
        """The sweep of a folder. Raises InputError where it is none."""
        if not is_regular_file(folder / SWEEP):
            raise InputError(f"{folder} is not a sweep ({SWEEP} is missing)")
        return cls.parse(read_json(folder / SWEEP), source=str(folder / SWEEP))


@dataclass
class SweepRun:
    """One run of a sweep, and how it stands."""

    arm: str
    seed: int
    path: Path
    settings: list[str]
    steps: int
    status: Status = "waiting"

    @property
    def name(self) -> str:
        return f"{self.arm}/seed-{self.seed}"

    def step(self) -> int:
        """The last step that its metrics tell of."""
        lines = RunFolder(self.path).read_metrics()
        return int(lines[-1]["step"]) if lines else 0


def check_number_of_runs(count: int) -> None:
    """Raises InputError where a sweep would have more runs than any."""
    if count > MAX_RUNS:
        raise InputError(f"the sweep would have {count:,} runs; allowed: {MAX_RUNS:,} or fewer")


def run_path(folder: Path, arm: str, seed: int) -> Path:
    """Where a sweep keeps a run."""
    return folder / arm / f"seed-{seed}"


def runs_by_arm(paths: list[Path]) -> list[tuple[str, list[Path]]]:
    """The runs of run folders and sweeps, begun or not, by arm; of several paths, the path stands in the name.

    Raises InputError where a path is neither.
    """
    names = [path.name for path in paths]  # whose bytes need not be UTF-8
    arms: list[tuple[str, list[Path]]] = []
    for path in paths:
        prefix = plain_text(path.name if names.count(path.name) == 1 else str(path))
        if not is_regular_file(path / SWEEP):
            RunFolder(path).read_recipe()
            arms.append((prefix, [path]))
            continue
        sweep = Sweep.read(path)
        for name in sweep.arms:
            full = name if len(paths) == 1 else f"{prefix}/{name}"
            arms.append((full, [run_path(path, name, seed) for seed in sweep.seeds]))
    return arms


def packaged_ablations() -> list[str]:
    """Names of the ablations inside the package, as `kmixer sweep` takes them."""
    folder = resources.files("kmixer") / "recipes" / ABLATIONS
    names = (file.name.removesuffix(".toml") for file in folder.iterdir() if file.name.endswith(".toml"))
    return sorted(ABLATIONS + name for name in names)


def read_ablation(name: str) -> str:
    """The text of a packaged ablation. Raises InputError where there is none of this name."""
    if name not in packaged_ablations():
        raise InputError(f"ablation {name!r}: no such ablation; allowed: {', '.join(packaged_ablations())}")
    return (resources.files("kmixer") / "recipes" / f"{name}.toml").read_text(encoding="utf-8")


def load_ablation(name: str) -> Sweep:
    """A packaged ablation. Raises InputError where there is none of this name."""
    return Sweep.parse(parse_toml(read_ablation(name), f"ablation {name}"), source=f"ablation {name}")


def read_ablation_file(path: Path) -> Sweep | None:
    """The ablation a TOML file holds; None where it is a recipe."""
    values = read_toml(path)
    return Sweep.parse(values, source=str(path)) if "arms" in values else None


def arms_of_grid(grid: dict[str, list[str]]) -> dict[str, list[str]]:
    """An arm for every combination of the keys' values, the last key fastest; "base" where there is no grid.

    Raises InputError where two of them would share a name.
    """
    check_number_of_runs(math.prod(map(len, grid.values())))
    arms: dict[str, list[str]] = {}
    for values in itertools.product(*grid.values()):
        pairs = list(zip(grid, values, strict=True))
        name = "_".join(f"{key.rsplit('.', 1)[-1]}={value}" for key, value in pairs) or "base"
        name = "".join(c if c.isalnum() or c in "=_.,+-" else "-" for c in name)
        if name in arms:
            raise InputError(f"--grid: two combinations would be called {name}; give every value once")
        arms[name] = [f"{key}={value}" for key, value in pairs]
    return arms


def sweep_runs(folder: Path, sweep: Sweep) -> list[SweepRun]:
    """All runs of a sweep in the order they are made: every arm of the first seed, then of the next.

    Raises InputError where an arm's settings are not a recipe, or a run that is there was made by another.
    """
    runs = []
    for seed in sweep.seeds:
        for name, changed in sweep.arms.items():
            if any(setting.partition("=")[0].strip() == "training.seed" for setting in changed):
                raise InputError("training.seed: a sweep gives every arm the same seeds; choose them with --seeds")
            settings = [*sweep.settings, *changed, f"training.seed={seed}"]
            recipe = load_recipe(sweep.recipe_of(seed), settings)
            run = SweepRun(name, seed, run_path(folder, name, seed), settings, recipe.training.steps)
            there = RunFolder(run.path)
            if there.exists():
                there.check_recipe(recipe, but_for=("tokenizer.vocabulary_size",))  # known with the data only
                run.status = "finished" if there.results() else "diverged" if there.diverged() else "waiting"
            runs.append(run)
    return runs


def check_sweep(folder: Path, sweep: Sweep) -> Sweep:
    """The sweep as its folder is to hold it: one that is there goes on, and may get more seeds.

    Raises InputError where the folder holds anything else.
    """
    if is_regular_file(folder / SWEEP):
        there = Sweep.read(folder)
        if there.model_copy(update={"seeds": sweep.seeds, "description": sweep.description}) != sweep:
            raise InputError(
                f"{folder} holds another sweep: {there.recipe} with {there.settings} in the arms {there.arms}; "
                "choose another --out"
            )
        more = [seed for seed in sweep.seeds if seed not in there.seeds]
        return sweep.model_copy(update={"seeds": there.seeds + more})
    if folder.exists() and (not folder.is_dir() or any(path.name != LOCK for path in folder.iterdir())):
        raise InputError(f"{folder} exists and is not a sweep; choose another --out")
    return sweep


def command_of(sweep: Sweep) -> str:
    """The command line that makes a sweep, without where it is written and how many processes make it."""
    words = ["kmixer", "sweep"]
    seeds = ["--seeds", ",".join(map(str, sweep.seeds)) + "," * (len(sweep.seeds) == 1)]
    for name in packaged_ablations() if sweep.begin_from is None else ():
        packaged = load_ablation(name)
        common = len(packaged.settings)
        if (packaged.recipe, packaged.arms, packaged.settings) == (sweep.recipe, sweep.arms, sweep.settings[:common]):
            words += [name, *(seeds if sweep.seeds != packaged.seeds else [])]
            return shlex.join([*words, *_options("--set", sweep.settings[common:])])
    grid: dict[str, list[str]] = {}
    for setting in itertools.chain.from_iterable(sweep.arms.values()):
        key, _, value = setting.partition("=")
        if value not in grid.setdefault(key, []):
            grid[key].append(value)
    if math.prod(map(len, grid.values())) != len(sweep.arms) or arms_of_grid(grid) != sweep.arms:
        return "kmixer sweep FILE.toml"  # an ablation of its own: its arms stand beside its table
    values = [f"{key}={','.join(choices)}" for key, choices in grid.items()]
    words += [] if sweep.begins_with_own_recipe else [sweep.recipe]
    words += [] if sweep.begin_from is None else ["--from", sweep.begin_from]
    return shlex.join([*words, *seeds, *_options("--grid", values), *_options("--set", sweep.settings)])


def _options(option: str, values: list[str]) -> list[str]:
    return [word for value in values for word in (option, value)]
