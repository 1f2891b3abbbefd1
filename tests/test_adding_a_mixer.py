"""docs/adding-a-mixer.md, followed to the letter in a copy of the package."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import kmixer

ROOT = Path(__file__).parents[1]

PAGE = (ROOT / "docs/adding-a-mixer.md").read_text(encoding="utf-8")
# What makes the page's commands small; the page itself is for real sizes.
SMALL = {
    "bench": "--t 40 --width 32 --repeats 1 --json",
    "train": "--set data.corpus={text} --set data.validation=0.2 --set tokenizer.vocabulary_size=300 "
    "--set model.width=16 --set model.layers=2 --set model.heads=2 --set training.steps=6 "
    "--set training.batch_size=4 --set training.window=32 --set training.warmup_steps=2 "
    "--set training.evaluate_every=3",
    "params": "--json",
    "generate": "--max-new-tokens 5 --seed 1",
    "pytest": "-q -p no:cacheprovider -n 0",
}


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```$", PAGE, re.M | re.S)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package as the page leaves it: what it does not touch is linked."""
    folder = tmp_path_factory.mktemp("added")
    shutil.copytree(
        Path(kmixer.__file__).parent,
        folder / "src/kmixer",
        ignore=shutil.ignore_patterns("__pycache__"),
        copy_function=lambda source, target: Path(target).symlink_to(Path(source).absolute()),
    )
    for code in blocks("python"):
        path, _, rest = code.partition("\n")
        (folder / path.removeprefix("# ")).write_text(rest)
    (change,) = blocks("diff")
    path, *lines = change.splitlines()
    target = folder / path.removeprefix("# ")
    before = "".join(f"{line[1:]}\n" for line in lines if line[0] == " ")
    after = "".join(f"{line[1:]}\n" for line in lines)
    text = target.read_text()
    assert text.count(before) == 1
    target.unlink()
    target.write_text(text.replace(before, after))
    return folder


def run(command: str, package: Path, text_file: Path) -> str:
    """One line of the page, made small."""
    words = shlex.split(command)
    program = [sys.executable, "-m", "kmixer"] if words[0] == "kmixer" else [sys.executable]
    kind = next(kind for kind in SMALL if kind in words)
    words = [*program, *words[1:], *SMALL[kind].format(text=text_file).split()]
    words = [str(package / word) if word.startswith("runs/") else word for word in words]
    environment = os.environ | {"PYTHONPATH": str(package / "src")}
    answer = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert answer.returncode == 0, f"{command}\n{answer.stdout}{answer.stderr}"
    return answer.stdout


def test_the_page_is_three_pieces_and_its_commands_run(package: Path, text_file: Path) -> None:
    assert [len(blocks(kind)) for kind in ("python", "diff", "sh")] == [2, 1, 1]
    outputs = {}
    for command in blocks("sh")[0].splitlines():
        tests = "tests/models/test_mixers.py tests/test_architecture.py"  # where the laws are, of all that is named
        outputs[command.split()[1]] = run(command.replace("pytest tests ", f"pytest {tests} "), package, text_file)
    assert json.loads(outputs["params"])["parts"]["stack.mixer"] > 0
    assert "ema layer" in {row["what"] for row in json.loads(outputs["bench"])["rows"]}
    assert outputs["generate"].startswith("KING")
    lines = [json.loads(line) for line in (package / "runs/ema/metrics.jsonl").read_text().splitlines()]
    decays = [line["dynamics"]["ema_decay"] for line in lines if "dynamics" in line]
    assert [len(layer) for layer in decays[0]] == [16]
    assert decays[0] != decays[-1]
