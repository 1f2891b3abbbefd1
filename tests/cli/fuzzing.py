"""Damage to the files of a run, the commands that read it, and what they must not do: a defect, a hang, wrong figures.

Used by `test_fuzz.py`, a few cases at every test run, and by `benchmarks/fuzz.py`, thousands.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import shutil
import signal
import tarfile
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import tomli_w

from kmixer.cli.main import run as run_command
from kmixer.runs.recipe import load_recipe
from kmixer.runs.run_folder import FILES
from kmixer.training.loop import train
from tests.conftest import tiny_recipe_values

# What a case may take: all but report and export are done in less than a second.
SECONDS = 120

# Files of a finished run; a run has one of results and diverged.
RUN_FILES = [name for name in FILES if name != "diverged.json"]
# What `kmixer lab` may have left there, which a report draws.
LAB_FILES = [f"lab-{panel}.json" for panel in ("signal", "overlap", "geometry", "ecology")]
DOCUMENTS = [name for name in RUN_FILES if not name.endswith(".safetensors")]

Kind = Literal[
    "flip", "truncate", "empty", "swap", "delete", "folder", "fifo", "loop", "device", "value", "text", "line", "append"
]
KINDS: tuple[Kind, ...] = Kind.__args__  # type: ignore[attr-defined]

VALUES: list[Any] = [
    None,
    [],
    {},
    5,
    -1,
    0,
    "x",
    1e308,
    0.5,
    True,
    10**50,
    [[[]]],
    {"a": {"b": 1}},
    "\x1b[31m\n",
    1e-300,
]
TEXTS = [
    "[]",
    "5",
    "null",
    "{}",
    '"x"',
    "[" * 10_000,
    "9" * 5_000,
    '{"a":' * 10_000,
    "\x00",
    "\udcff",
    "value = " + "9" * 5_000,
]


@dataclass(frozen=True)
class Case:
    """A command after one change of one file."""

    command: str
    file: str
    kind: Kind
    seed: int


@dataclass(frozen=True)
class Verdict:
    """How it ended: "refused", "same" and "said", with a word, are right; "accepted" gave others without one."""

    ending: Literal["refused", "same", "said", "accepted", "defect", "hang"]
    said: str


class HangError(BaseException):
    """A command took too long. Not an Exception, so that nothing of ours handles it."""


@dataclass(frozen=True)
class Bench:
    """A folder with two runs that differ in their seed, and a place where one of them is damaged."""

    folder: Path

    @classmethod
    def make(cls, folder: Path) -> Bench:
        folder.mkdir(parents=True, exist_ok=True)
        corpus = folder / "corpus.txt"
        rng = random.Random(0)
        words = ["state", "block", "mixer", "kernel", "and", "the", "of", "a"]
        for text in (corpus, folder / "other.txt"):
            text.write_text("\n".join(" ".join(rng.choices(words, k=9)) for _ in range(60)), encoding="utf-8")
        values = tiny_recipe_values(corpus)
        values["model"] |= {"width": 8, "layers": 1}
        values["training"] |= {"steps": 3, "window": 16, "evaluate_every": 1, "log_every": 1, "warmup_steps": 1}
        (folder / "tiny.toml").write_text(tomli_w.dumps(values), encoding="utf-8")
        for seed in (1, 2):
            recipe = load_recipe(str(folder / "tiny.toml"), [f"training.seed={seed}"])
            train(recipe, folder / f"seed-{seed}", cpu=True)
        entry = {"name": "one", "title": "One run", "sweep": "work/run"}
        (folder / "results.toml").write_text(tomli_w.dumps({"title": "Results", "result": [entry]}), encoding="utf-8")
        return cls(folder)

    def measure(self) -> None:
        """Leave in both runs what `kmixer lab` measures."""
        for seed in (1, 2):
            self._measure(self.folder / f"seed-{seed}")

    def _measure(self, run: Path) -> None:
        few = ("--inits", "2", "--windows", "12", "--window", "12")
        sources = [str(self.folder / name) for name in ("corpus.txt", "other.txt")]
        for command in (
            ["signal", str(run), "--inputs", "2", "--window", "12"],
            ["overlap", str(run), *few],
            ["geometry", str(run), *few],
            ["ecology", *sources, "--blocks", "8", "--window", "16", "--model", str(run)],
        ):
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as err:
                code = run_command(["lab", *command, "--save"])
            assert code == 0, err.getvalue()

    @property
    def run(self) -> Path:
        return self.folder / "work" / "run"

    @property
    def output(self) -> Path:
        return self.folder / "work" / "out"

    def arguments(self, command: str) -> list[str]:
        """The command line; what it writes goes into the folder `output`."""
        run, out = str(self.run), str(self.output)
        return {
            "eval": ["eval", run, "--json"],
            "generate": ["generate", run, "--prompt", "the ", "--max-new-tokens", "6", "--seed", "1"],
            "ngram": ["ngram", run, "--order", "3", "--out", f"{out}/counts.safetensors", "--json"],
            "analyze": ["analyze", run, "--json"],
            "compare": ["compare", run, "--json", "--learned", "--reach", "3.5"],
            "report": ["report", run, "--out", f"{out}/report.html"],
            "pack": ["pack", run, "--out", f"{out}/run.tar.gz"],
            "export": ["export", run, "--out", f"{out}/export", "--format", "torch"],
            "results": ["results", str(self.folder / "results.toml"), "--out", f"{out}/page.md"],
            "resume": ["train", str(self.folder / "tiny.toml"), "--set", "training.seed=1", "--out", run, "--resume"],
        }[command]

    def prepare(self) -> None:
        """A fresh copy of the first run."""
        shutil.rmtree(self.folder / "work", ignore_errors=True)
        shutil.copytree(self.folder / "seed-1", self.run)
        self.output.mkdir()

    def answer(self, command: str) -> tuple[int, str, str]:
        """Exit code, what it gave (printed and written, but for times), and its complaint."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _time_limit():
            code = run_command(self.arguments(command))
        return code, _without_times(out.getvalue()) + self._written(command), err.getvalue()

    def _written(self, command: str) -> str:
        if command == "pack":
            archive = self.output / "run.tar.gz"
            if not archive.is_file():
                return ""
            with tarfile.open(archive) as tar:
                contents = {member.name: tar.extractfile(member) for member in tar.getmembers()}
                return repr({name: file.read() for name, file in sorted(contents.items()) if file is not None})
        if command == "export":  # what torch.export writes is not the same twice
            steps = self.output / "export" / "step.json"
            return steps.read_text(encoding="utf-8") if steps.is_file() else ""
        paths = sorted(path for path in self.output.rglob("*") if path.suffix in (".html", ".md", ".json"))
        return "".join(_without_times(path.read_text(encoding="utf-8")) for path in paths)

    def unchanged(self, command: str) -> str:
        """What the command gives for the run as it was. It must succeed."""
        self.prepare()
        code, given, err = self.answer(command)
        assert code == 0, err
        return given

    def judge(self, case: Case, right: str) -> Verdict:
        """Damage a fresh copy and run the command; `right` is what it gives for the run as it was."""
        self.prepare()
        damage(self.run / case.file, self.folder / "seed-2" / case.file, case)
        try:
            code, given, err = self.answer(case.command)
        except HangError:
            return Verdict("hang", f"not done after {SECONDS} s")
        except Exception as error:
            return Verdict("defect", f"{type(error).__name__}: {error}")
        if code == 0:
            return Verdict("same" if given == right else "said" if err.strip() else "accepted", err)
        one_line = len(err.splitlines()) == 1 and len(err) < 5000 and err.startswith("error: ")
        escapes = any(character < " " for character in err.rstrip("\n"))
        wrong = code != 2 or "Traceback" in err or "--debug shows where" in err or not one_line or escapes
        return Verdict("defect" if wrong else "refused", err)


COMMANDS = ("eval", "generate", "ngram", "analyze", "compare", "pack", "results", "resume", "report", "export")


def _without_times(text: str) -> str:
    """Without what differs from one time to the next: seconds, and the date in a figure."""
    text = re.sub(r"done in \d+ s", "", text)
    return re.sub(r"<dc:date>.*?</dc:date>", "", text)


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise HangError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def damage(path: Path, other: Path, case: Case) -> None:
    """Change one file of a run; `other` is the same file of another run."""
    rng = random.Random(case.seed)
    content = path.read_bytes()
    match case.kind:
        case "flip":
            _write(path, _flipped(content, rng))
        case "truncate":
            _write(path, content[: rng.randrange(len(content))])
        case "append":
            _write(path, content + rng.randbytes(rng.choice([1, 100])))
        case "empty":
            _write(path, b"")
        case "swap":
            _write(path, other.read_bytes())
        case "value" | "line" if path.name.endswith(".safetensors"):
            _write(path, _flipped(_flipped(content, rng), rng))
        case "value":
            _write(path, _with_another_value(path, content, rng))
        case "line":
            lines = content.splitlines(keepends=True)
            _write(path, b"".join(line for index, line in enumerate(lines) if index != rng.randrange(len(lines))))
        case "text":
            _write(path, rng.choice(TEXTS).encode("utf-8", "surrogateescape"))
        case _:
            path.unlink()
            special: dict[str, Callable[[], object]] = {
                "delete": lambda: None,
                "folder": path.mkdir,
                "fifo": lambda: os.mkfifo(path),
                "loop": lambda: path.symlink_to(path.name),
                "device": lambda: path.symlink_to("/dev/zero"),
            }
            special[case.kind]()


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _flipped(content: bytes, rng: random.Random) -> bytes:
    damaged = bytearray(content)
    damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def _with_another_value(path: Path, content: bytes, rng: random.Random) -> bytes:
    """The same document with one value replaced, removed or moved."""
    text = content.decode()
    if path.suffix == ".toml":
        values = tomllib.loads(text)
        _replace_one(values, rng, [value for value in VALUES if value is not None and value != 10**50])
        return tomli_w.dumps(values).encode()
    if path.suffix == ".jsonl":
        lines = [json.loads(line) for line in text.splitlines()]
        _replace_one(lines, rng, VALUES)
        return "".join(json.dumps(line) + "\n" for line in lines).encode()
    value = json.loads(text)
    _replace_one(value, rng, VALUES)
    return json.dumps(value).encode()


def _replace_one(value: Any, rng: random.Random, values: list[Any]) -> None:
    """Change one place of a tree of lists and dictionaries, any of them as likely as another."""
    places: list[tuple[Any, Any]] = []
    todo = [value]
    while todo:
        part = todo.pop()
        for key in list(part) if isinstance(part, dict) else range(len(part)):
            places.append((part, key))
            if isinstance(part[key], dict | list):
                todo.append(part[key])
    part, key = rng.choice(places)
    there = part[key]
    if isinstance(there, bool | int | float) and rng.random() < 0.5:
        part[key] = rng.choice([there + 1, there * 1.5, -there])
    elif isinstance(part, dict) and rng.random() < 0.2:
        del part[key]
    else:
        part[key] = rng.choice(values)
