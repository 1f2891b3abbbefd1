"""A run on disk: everything needed to evaluate, resume, generate and report.

recipe.toml               the recipe, fully resolved
config.json               the model's configuration
tokenizer.json
model.safetensors         weights with the lowest validation loss so far
metrics.jsonl             one JSON object a line: training losses and evaluations
environment.json          versions, device, commit, sha256 of the corpus
results.json              when the run has ended: losses of the best and of the last weights, size and cost, and
                          the sha256 of every other file
diverged.json             instead of it, when a loss or gradient was not finite: at which step
checkpoints/last.safetensors    weights and optimiser state of the last checkpoint

Files are checked where they are read (kmixer.runs.integrity); a run is made whole, by one process (publishing).
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from kmixer.errors import InputError
from kmixer.files import (
    LINES_BYTES,
    describe_write_error,
    is_regular_file,
    is_there,
    read_bytes,
    read_toml,
    write_json,
    write_text,
)
from kmixer.runs import integrity, publishing
from kmixer.runs.environment import environment
from kmixer.runs.layout import CHECKPOINT as CHECKPOINT
from kmixer.runs.layout import DIVERGED as DIVERGED
from kmixer.runs.layout import ENVIRONMENT as ENVIRONMENT
from kmixer.runs.layout import FILES as FILES
from kmixer.runs.layout import METRICS as METRICS
from kmixer.runs.layout import RECIPE as RECIPE
from kmixer.runs.layout import RESULTS as RESULTS
from kmixer.runs.layout import written_in_part
from kmixer.runs.recipe import AnyRecipe, load_recipe, parse_recipe
from kmixer.runs.records import read_environment, read_metrics

# In the place of the sha256 of a text that was not at hand.
UNKNOWN = "unknown"


class RunFolder:
    """Paths and small files of one run."""

    def __init__(self, path: Path) -> None:
        # A link would be replaced by a folder, and `.` and `..` are no names to put others beside.
        linked = path.is_symlink() or path.name in ("", "..")
        self.path = path = Path(os.path.realpath(path)) if linked else path
        self.metrics = path / METRICS
        self.checkpoint = path / CHECKPOINT

    def exists(self) -> bool:
        return is_regular_file(self.path / RECIPE)

    def check_free(self, *, force: bool) -> None:
        """Raises InputError where a new run would destroy something."""
        if os.path.realpath(self.path) == str(Path.cwd()):  # Path.resolve raises on a loop of links
            raise InputError(
                f"--out: {self.path} is the current folder, which cannot be replaced; choose one inside it"
            )
        if self.exists():
            if not force:
                raise InputError(
                    f"{self.path} holds a run; add --resume to continue it, --force to replace it, or choose --out"
                )
        elif self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise InputError(f"{self.path} exists and is not a run; choose another --out")

    @contextlib.contextmanager
    def held(self, *, to_read: bool = False) -> Iterator[None]:
        """Keep other processes from training into this folder, replacing or packing it.

        A replacement that was killed half-way is ended first, and a folder that is staged but not published is removed
        at the end. Raises InputError where another process holds it.

        Args:
            to_read: nothing will be written, so that a folder on a disk that cannot be written is no error.
        """
        with publishing.hold(self.path, to_read=to_read):
            yield

    def settle(self) -> None:
        """End a replacement that was killed half-way. Raises InputError where a process is about it."""
        if publishing.is_torn(self.path):
            with self.held():
                pass

    def staged(self) -> RunFolder:
        """A fresh hidden folder for a run that has still to prove that it works; `publish` puts it here.

        To be called while the folder is held.
        """
        return RunFolder(publishing.stage(self.path))

    def publish(self, target: RunFolder) -> None:
        """Move this staged run to its place; a run that is there is replaced, other files there are not touched."""
        publishing.publish(self.path, target.path)

    def remove_leftovers(self) -> None:
        """Remove what writes of a killed process left behind, and the word of a divergence."""
        (self.path / DIVERGED).unlink(missing_ok=True)
        for path in written_in_part(self.path):
            path.unlink(missing_ok=True)

    def identity(self) -> str:
        """What the run is known by, the sha256 of its recipe.toml: its other files carry it as "recipe_sha256"."""
        return integrity.identity(self.path)

    def check_files(self, *names: str) -> None:
        """Raises InputError, one line, where one of these files is not what the run wrote; all of them without names.

        Weights and checkpoint are checked by their headers: who reads their tensors notices damage there.
        """
        self.settle()
        if self.exists():
            integrity.check_files(self.path, *(names or FILES))

    def write_recipe(self, recipe: AnyRecipe) -> None:
        write_text(self.path / RECIPE, recipe.to_toml())

    def read_recipe(self) -> AnyRecipe:
        """The recipe, with which the run began. Raises InputError where there is none or it was changed since."""
        self.settle()
        if not self.exists():
            raise InputError(f"{self.path} holds no run ({RECIPE} is missing)")
        path = self.path / RECIPE
        recipe = parse_recipe(read_toml(path), str(path))
        self.check_files(RECIPE)
        return recipe

    def changed_recipe(self, settings: list[str]) -> AnyRecipe:
        """The recipe with `key=value` settings applied, for another run. Raises InputError as `read_recipe` does."""
        self.read_recipe()
        return load_recipe(str(self.path / RECIPE), settings)

    def recipe_with_data(self, data: str | None = None) -> AnyRecipe:
        """The recipe, its data where it is now.

        Args:
            data: a file, a folder or a registered name in the place of the recipe's; see `check_data`.

        Raises InputError where the data was read from a path that is gone.
        """
        recipe = self.read_recipe()
        if data is not None:
            return recipe.with_data_at(data)
        if recipe.data_path is not None and not recipe.data_path.exists():
            raise InputError(
                f"{self.path} was trained on {recipe.data_path}, which is not there; --corpus FILE says where it is now"
            )
        return recipe

    def check_data(self, sha256: str) -> None:
        """Raises InputError where data of this sha256 is not what the run was trained on, wherever it lies."""
        known = self.environment()["corpus_sha256"]
        if known not in (sha256, UNKNOWN):
            raise InputError(
                f"the data is not what {self.path} was trained on (another sha256); --corpus FILE says where that is"
            )

    def check_recipe(self, recipe: AnyRecipe, but_for: tuple[str, ...] = ()) -> None:
        """Raises InputError naming the keys, but for these, in which a run's recipe differs from this one."""
        ours, theirs = (read.with_whole_path().by_key() for read in (self.read_recipe(), recipe))
        keys = (ours.keys() | theirs.keys()) - {"description", *but_for}
        changed = [key for key in sorted(keys) if ours.get(key) != theirs.get(key)]
        if changed:
            said = "; ".join(f"{key} is {ours.get(key)!r} in the run and {theirs.get(key)!r} now" for key in changed)
            raise InputError(f"cannot resume {self.path} with another recipe: {said}")

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; the last is left out while it is being written.

        Raises InputError where they are something else, or were shortened or edited since the last checkpoint.
        """
        lines = read_metrics(self.metrics) if is_there(self.metrics) else []
        self.check_files(METRICS)
        return lines

    def results(self) -> dict[str, Any] | None:
        """results.json, which is there once the run has ended.

        Raises InputError where it is something else, or a file of the run was changed.
        """
        self.check_files()
        return integrity.read_results(self.path) or None

    def write_results(self, results: dict[str, Any]) -> None:
        """Write results.json, which seals the run: it holds the sha256 of every other file."""
        write_json(self.path / RESULTS, integrity.sealed(self.path, results))

    def environment(self) -> dict[str, Any]:
        """environment.json. Raises InputError where it is something else."""
        return read_environment(self.path / ENVIRONMENT)

    def diverged(self) -> bool:
        """Whether training ended with a loss or gradient that was not finite."""
        return (self.path / DIVERGED).is_file()

    def append_metrics(self, line: dict[str, Any]) -> None:
        try:
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise describe_write_error(error, self.metrics) from error

    def metrics_mark(self) -> dict[str, Any]:
        """Length and sha256 of metrics.jsonl, flushed to the disk: a checkpoint keeps this."""
        if not self.metrics.exists():
            return integrity.mark_of(b"")
        with self.metrics.open("rb") as file:
            os.fsync(file.fileno())
            return integrity.mark_of(file.read())

    def rewind_metrics(self, mark: dict[str, Any]) -> None:
        """Cut metrics.jsonl back to a checkpoint's mark. Raises InputError where it was shortened or edited."""
        content = read_bytes(self.metrics, LINES_BYTES) if is_there(self.metrics) else b""
        kept = content[: mark["bytes"]]
        if integrity.mark_of(kept) != mark:
            raise integrity.changed(self.path, METRICS)
        if len(content) > len(kept):
            write_text(self.metrics, kept.decode())

    def write_environment(
        self,
        device: torch.device,
        processes: int,
        corpus_sha256: str,
        begun_from: dict[str, Any] | None = None,
    ) -> None:
        """Write environment.json, after recipe.toml; `begun_from` says whose weights the run began with."""
        origin = {} if begun_from is None else {"from": begun_from}
        known = {"corpus_sha256": corpus_sha256, integrity.RUN: self.identity()}
        write_json(self.path / ENVIRONMENT, environment(device, processes) | known | origin)

    def note_resumption(self, device: torch.device, processes: int, step: int) -> None:
        """Add to environment.json what continues the run after so many steps."""
        there = self.environment()
        again = {"step": step, **environment(device, processes)}
        write_json(self.path / ENVIRONMENT, there | {"resumed": [*there.get("resumed", []), again]})

    def made_with(self, key: str) -> list[str]:
        """Values of this key of the environment: at the start, and every time the run was resumed."""
        there = self.environment()
        return [str(start[key]) for start in (there, *there.get("resumed", []))]
