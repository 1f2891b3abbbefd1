"""kmixer eval and analyze of models with fast weights: attached to a run, adapting and not, documents."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from kmixer.cli.adaptation import named_stretches
from kmixer.runs.check import check_run
from kmixer.runs.run_folder import RunFolder
from kmixer.training.loop import train
from tests.cli.conftest import Run
from tests.training.test_origin import values

FAST = {"layers": [1], "chunk": 8, "rate": 0.3, "init": "next"}


@pytest.fixture
def corpus(text: str, tmp_path: Path) -> Path:
    """A folder of files."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for index in range(5):
        (folder / f"{index}.txt").write_text(text[4000 * index : 4000 * (index + 1)])
    return folder


@pytest.fixture
def run(corpus: Path, tmp_path: Path) -> Path:
    data = {"validation": ["3.txt", "4.txt"]}
    return train(values(corpus, model={"fast_weights": FAST}, data=data), tmp_path / "run").run


@pytest.fixture
def plain(text_file: Path, tmp_path: Path) -> Path:
    return train(values(text_file), tmp_path / "plain").run


def figures(kmixer_command: Run, run: Path, *options: object) -> dict[str, Any]:
    answer = kmixer_command("eval", run, *options, "--json")
    assert answer.code == 0, answer
    found: dict[str, Any] = json.loads(answer.out)
    return found


def test_windows_and_stream_with_adapting_and_without(kmixer_command: Run, run: Path) -> None:
    stream = figures(kmixer_command, run, "--protocol", "stream")
    still = figures(kmixer_command, run, "--protocol", "stream", "--adapt", "off")
    reset = figures(kmixer_command, run, "--protocol", "stream", "--reset-every", 8)
    assert (stream["adapt"], still["adapt"], reset["reset_every"]) == ("on", "off", 8)
    assert len(stream["tenths"]) == 10
    assert stream["moves"]["layers"] == ["blocks.1"]
    assert stream["moves"]["tokens"][-1] == stream["tokens"]
    assert all(move > 0 for (move,) in stream["moves"]["moves"])
    assert all(move == 0 for (move,) in still["moves"]["moves"])
    assert reset["loss"] == pytest.approx(still["loss"], rel=1e-6)  # a chunk is forgotten before it is read
    assert stream["loss"] != pytest.approx(still["loss"], rel=1e-6)
    windows = figures(kmixer_command, run)
    assert "moves" not in windows
    assert windows["loss"] == pytest.approx(
        json.loads((run / "results.json").read_text())["best"]["validation"][0]["loss"]
    )
    assert figures(kmixer_command, run, "--adapt", "off")["loss"] != windows["loss"]
    printed = kmixer_command("eval", run, "--protocol", "stream", "--reset-every", 64).out
    assert "state carried, adapting, reset every 64 tokens" in printed
    assert re.search(r"moved, \|F\| / \|W\|    blocks\.1: \d+\.\d{3}", printed)
    assert "not adapting" in kmixer_command("eval", run, "--adapt", "off").out


def test_figures_of_an_evaluation(kmixer_command: Run, run: Path, plain: Path, tmp_path: Path) -> None:
    texts = {}
    for name, model, options in (
        ("stream", run, ["--protocol", "stream"]),
        ("plain stream", plain, ["--protocol", "stream"]),
        ("windows", plain, ["--window", 24]),
        ("documents", run, ["--documents"]),
    ):
        figure = tmp_path / f"{name}.svg"
        assert kmixer_command("eval", model, *options, "--figure", figure).code == 0
        texts[name] = figure.read_text()
    for name, labels in {
        "stream": ("tokens read", "nats per token", "|F| / |W|"),
        "plain stream": ("tokens read", "nats per token"),
        "windows": ("position, up to", "nats per token"),
        "documents": ("position, up to", "nats per token"),
    }.items():
        assert all(f">{label}</text>" in texts[name] for label in labels)
    assert "|F| / |W|" not in texts["plain stream"]
    assert "--figure: got a.pdf" in kmixer_command("eval", run, "--figure", "a.pdf").error()
    assert "leave --text" in kmixer_command("eval", run, "--tasks", "x", "--figure", tmp_path / "a.svg").error()


def test_stretches_are_named_as_far_as_positions_go() -> None:
    assert [name for name, _ in named_stretches([4.0, 3.0, 2.0, 1.0, 0.5], 10)] == ["1", "2", "3-4", "5-8", "9-10"]
    assert [name for name, _ in named_stretches([4.0, 3.0, 2.0], 3)] == ["1", "2", "3"]
    assert [name for name, _ in named_stretches([4.0, 3.0, 2.0], 4)] == ["1", "2", "3-4"]


def test_documents(kmixer_command: Run, run: Path, plain: Path) -> None:
    found = figures(kmixer_command, run, "--documents")
    assert (found["documents"], len(found["thirds"]), found["lengths"]) == (2, 3, [3999, 3999])
    assert figures(kmixer_command, run, "--documents", "--adapt", "off")["loss"] != found["loss"]
    printed = kmixer_command("eval", run, "--documents").out
    assert "2 documents, each from a fresh state, adapting" in printed
    assert "by third            first: " in printed
    assert "is one text" in kmixer_command("eval", plain, "--documents").error()
    assert "leave --text, --window" in kmixer_command("eval", run, "--documents", "--window", 8).error()


def test_what_does_not_adapt_says_so(kmixer_command: Run, run: Path, plain: Path) -> None:
    for options in (["--adapt", "off"], ["--reset-every", 64]):
        error = kmixer_command("eval", plain, *options).error()
        assert f"{options[0]}: this model has no fast weights, so that nothing in it adapts; leave it out" in error
    assert "allowed: 1 token or more" in kmixer_command("eval", run, "--reset-every", 0).error()
    both = kmixer_command("eval", run, "--reset-every", 64, "--adapt", "off")
    assert "give one of them" in both.error()
    assert kmixer_command("eval", plain, "--adapt", "on").code == 0


def test_fast_weights_are_attached_to_a_run(kmixer_command: Run, plain: Path, tmp_path: Path) -> None:
    """With a filter of zeros the new run begins where the old one ended, and its record is whole."""
    fast = ["--set", "model.fast_weights.layers=[0,1]", "--set", "model.fast_weights.chunk=8"]
    answer = kmixer_command("train", "--from", plain, *fast, "--out", tmp_path / "fast")
    assert answer.code == 0, answer
    line = next(line for line in answer.out.splitlines() if line.startswith("begins with"))
    for name in ("filter", "target", "decay_logit"):
        assert f"stack.blocks.{{0,1}}.feed_forward.fast.{name}" in line
    assert line.endswith("model.fast_weights is new")
    first = json.loads((tmp_path / "fast/metrics.jsonl").read_text().splitlines()[0])
    best = json.loads((plain / "results.json").read_text())["best"]["validation"][0]["loss"]
    assert first["validation"][0]["loss"] == pytest.approx(best, rel=1e-6)
    assert first["dynamics"]["fast_weights"]["moves"] == [0, 0]
    check_run(RunFolder(tmp_path / "fast"))
    assert kmixer_command("report", tmp_path / "fast", "--figures", tmp_path / "figures").code == 0
    assert {path.stem for path in (tmp_path / "figures").iterdir()} >= {"fast-weights", "adapting"}


def test_analyze_prints_what_adapting_is_worth(kmixer_command: Run, run: Path) -> None:
    printed = kmixer_command("analyze", run).out
    assert re.search(r"fast weights of blocks\.1: moved \d+\.\d{3} of .* forgets in [56]\d\d tokens", printed)
    assert "position up to    loss  without adapting   worth" in printed
    measured = json.loads(kmixer_command("analyze", run, "--json").out)["fast_weights"]
    assert measured["positions"][-1] == 31


def test_fast_weights_that_never_forget_train_and_refuse_a_stream(
    kmixer_command: Run, text_file: Path, tmp_path: Path
) -> None:
    run = train(values(text_file, model={"fast_weights": {**FAST, "tau": "null"}}), tmp_path / "run").run
    protocols = [one["protocol"] for one in json.loads((run / "results.json").read_text())["best"]["validation"]]
    assert set(protocols) == {"windows"}
    assert "tau = null" in kmixer_command("eval", run, "--protocol", "stream").error()
    assert kmixer_command("eval", run, "--protocol", "stream", "--reset-every", 64).code == 0
    assert kmixer_command("eval", run, "--protocol", "stream", "--adapt", "off").code == 0
    assert "tau = null" in kmixer_command("generate", run, "--interactive").error()
    assert kmixer_command("generate", run, "--prompt", "the", "--max-new-tokens", 20).code == 0
