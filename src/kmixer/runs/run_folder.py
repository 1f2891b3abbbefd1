"""A run on disk: everything needed to evaluate, resume, generate and report.

recipe.toml               the recipe, fully resolved
config.json               the model's configuration
tokenizer.json
model.safetensors         weights with the lowest validation loss so far
metrics.jsonl             one JSON object a line: training losses and evaluations
environment.json          versions, device, commit, sha256 of the corpus
results.json              when the run has ended: losses of the best and of the last weights, size and cost
diverged.json             instead of it, when a loss or gradient was not finite: at which step
checkpoints/last.safetensors    weights and optimiser state of the last checkpoint
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import kmixer
from kmixer.errors import InputError
from kmixer.files import (
    LINES_BYTES,
    describe_write_error,
    is_regular_file,
    is_there,
    lock,
    plain_text,
    read_bytes,
    read_toml,
    write_json,
    write_text,
)
from kmixer.models.model_folder import CONFIG, TOKENIZER, WEIGHTS
from kmixer.runs.recipe import AnyRecipe, parse_recipe
from kmixer.runs.records import read_environment, read_metrics, read_results

RECIPE, METRICS, ENVIRONMENT, RESULTS, DIVERGED, CHECKPOINT = (
    "recipe.toml",
    "metrics.jsonl",
    "environment.json",
    "results.json",
    "diverged.json",
    "checkpoints/last.safetensors",
)
FILES = (RECIPE, CONFIG, TOKENIZER, WEIGHTS, METRICS, ENVIRONMENT, RESULTS, DIVERGED, CHECKPOINT)
NAMES = {Path(file).parts[0] for file in FILES}

# In the place of the sha256 of a text that was not at hand.
UNKNOWN = "unknown"


class RunFolder:
    """Paths and small files of one run."""

    def __init__(self, path: Path) -> None:
        # A link would be replaced by a folder, and the current folder has no name to put others beside.
        self.path = path = Path(os.path.realpath(path)) if path.is_symlink() or not path.name else path
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
    def held(self) -> Iterator[None]:
        """Keep other processes from training into this folder. Raises InputError where one does already."""
        beside = self.path.with_name(f".{self.path.name}.lock")
        handle = lock(beside, self.path)
        try:
            yield
        finally:
            beside.unlink(missing_ok=True)
            os.close(handle)

    def staged(self) -> RunFolder:
        """A fresh hidden folder beside this one, for a run that has still to prove that it works."""
        folder = RunFolder(self.path.with_name(f".{self.path.name}.new"))
        shutil.rmtree(folder.path, ignore_errors=True)
        return folder

    def publish(self, place: RunFolder) -> None:
        """Move this staged run to its place; a run that is there is replaced, other files beside it are kept."""
        old = place.path.with_name(f".{place.path.name}.old")
        try:
            shutil.rmtree(old, ignore_errors=True)
            if place.path.exists():
                place.path.rename(old)
            self.path.rename(place.path)
            if old.exists():
                for path in old.iterdir():
                    if path.name not in NAMES:
                        path.rename(place.path / path.name)
                shutil.rmtree(old)
        except OSError as error:
            raise describe_write_error(error, place.path) from error

    def remove_leftovers(self) -> None:
        """Remove what writes of a killed process left behind, and the word of a divergence."""
        (self.path / DIVERGED).unlink(missing_ok=True)
        for folder in (self.path, self.checkpoint.parent):
            for path in folder.glob(".*.tmp"):
                path.unlink(missing_ok=True)

    def write_recipe(self, recipe: AnyRecipe) -> None:
        write_text(self.path / RECIPE, recipe.to_toml())

    def read_recipe(self) -> AnyRecipe:
        if not self.exists():
            raise InputError(f"{self.path} holds no run ({RECIPE} is missing)")
        path = self.path / RECIPE
        return parse_recipe(read_toml(path), str(path))

    def check_recipe(self, recipe: AnyRecipe, but_for: tuple[str, ...] = ()) -> None:
        """Raises InputError naming the keys, but for these, in which a run's recipe differs from this one."""
        ours, theirs = self.read_recipe().by_key(), recipe.by_key()
        keys = (ours.keys() | theirs.keys()) - {"description", *but_for}
        changed = [key for key in sorted(keys) if ours.get(key) != theirs.get(key)]
        if changed:
            said = "; ".join(f"{key} is {ours.get(key)!r} in the run and {theirs.get(key)!r} now" for key in changed)
            raise InputError(f"cannot resume {self.path} with another recipe: {said}")

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; the last is left out while it is being written."""
        return read_metrics(self.metrics) if is_there(self.metrics) else []

    def results(self) -> dict[str, Any] | None:
        """results.json, which is there once the run has ended. Raises InputError where it is something else."""
        path = self.path / RESULTS
        return read_results(path) if is_there(path) else None

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
            return {"bytes": 0, "sha256": hashlib.sha256().hexdigest()}
        with self.metrics.open("rb") as file:
            os.fsync(file.fileno())
            content = file.read()
        return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    def rewind_metrics(self, mark: dict[str, Any]) -> None:
        """Cut metrics.jsonl back to a checkpoint's mark. Raises InputError where it was shortened or edited."""
        content = read_bytes(self.metrics, LINES_BYTES) if is_there(self.metrics) else b""
        kept = content[: mark["bytes"]]
        if len(kept) < mark["bytes"] or hashlib.sha256(kept).hexdigest() != mark["sha256"]:
            raise InputError(
                f"{self.metrics} was shortened or edited since the last checkpoint; restore it from a copy"
            )
        if len(content) > len(kept):
            write_text(self.metrics, kept.decode())

    def write_environment(self, device: torch.device, processes: int, corpus_sha256: str) -> None:
        write_json(self.path / ENVIRONMENT, environment(device, processes) | {"corpus_sha256": corpus_sha256})

    def note_resumption(self, device: torch.device, processes: int, step: int) -> None:
        """Add to environment.json what continues the run after so many steps."""
        there = self.environment()
        again = {"step": step, **environment(device, processes)}
        write_json(self.path / ENVIRONMENT, there | {"resumed": [*there.get("resumed", []), again]})

    def made_with(self, key: str) -> list[str]:
        """Values of this key of the environment: at the start, and every time the run was resumed."""
        there = self.environment()
        return [str(each[key]) for each in (there, *there.get("resumed", []))]


def environment(device: torch.device, processes: int = 1) -> dict[str, Any]:
    """Versions, device and commit a measurement was made with."""
    packages = ("numpy", "safetensors", "sentencepiece", "tokenizers", "pydantic", "accelerate")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "kmixer": kmixer.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        # torch's own word of its version names the build for a CPU or a GPU too.
        "packages": {"torch": torch.__version__, **{package: metadata.version(package) for package in packages}},
        "platform": platform.platform(),
        "device": f"{device.type}: {name}",
        "threads": torch.get_num_threads(),
        "processes": processes,
        "command": [Path(sys.argv[0]).name, *map(plain_text, sys.argv[1:])],
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of the checkout this package runs from; None where it was installed from elsewhere."""
    package = Path(kmixer.__file__).parent
    root = package.parent.parent
    if not (root / ".git").exists() or package.parent.name != "src" or shutil.which("git") is None:
        return None
    answer = subprocess.run(
        ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
        capture_output=True,
        text=True,
        check=False,
    )
    return answer.stdout.strip() or None
