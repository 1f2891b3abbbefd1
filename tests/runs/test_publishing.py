"""One process holds a run at a time; a run that replaces another takes its place only when it is worth it."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import kmixer
from kmixer.errors import DivergedError, InputError
from kmixer.files import lock, unlock
from kmixer.runs.check import check_run
from kmixer.runs.run_folder import RunFolder
from kmixer.training.language import LanguageTask
from kmixer.training.loop import train
from kmixer.training.trainer import Reporter, Trainer
from tests.training.test_loop import CrashError, InterruptAfter, StopAfter, make_recipe


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# kmixer.files alone, without torch: the package's own __init__ is not run.
HOLD = """
import os, sys, time, types
package = types.ModuleType("kmixer"); package.__path__ = [sys.argv[1]]; sys.modules["kmixer"] = package
from pathlib import Path
from kmixer.errors import InputError
from kmixer.files import lock, unlock
path, mark, held = Path(sys.argv[2]), Path(sys.argv[2] + ".mark"), 0
end = time.monotonic() + 3
while time.monotonic() < end:
    try:
        handle = lock(path, path)
    except InputError:
        continue
    os.close(os.open(mark, os.O_CREAT | os.O_EXCL))  # fails where another process is here
    mark.unlink()
    unlock(path, handle)
    held += 1
print(held)
"""


def test_processes_that_come_and_go_never_hold_one_file_together(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(Path(kmixer.__file__).parent), str(tmp_path / "lock")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    answers = [(*process.communicate(), process.returncode) for process in processes]
    assert [(error, code) for _, error, code in answers] == [("", 0)] * 4
    assert sum(int(out) for out, _, _ in answers) > 100
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_its_holder_removed_meanwhile_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A removes the file between B's opening and B's holding it; C makes another: only one of B and C has it."""
    import fcntl

    path = tmp_path / "lock"
    first = lock(path, path)
    flock, others = fcntl.flock, []

    def between(handle: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        unlock(path, first)
        others.append(lock(path, path))
        flock(handle, operation)  # of a file without a name: it succeeds

    monkeypatch.setattr(fcntl, "flock", between)
    with pytest.raises(InputError, match="is being run by another process"):
        lock(path, path)
    unlock(path, others[0])
    unlock(path, lock(path, path))
    assert not path.exists()


def test_a_run_that_came_while_the_data_was_read_is_not_replaced(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B finds the folder free, reads its corpus, and A's run has come meanwhile."""
    recipe, run = make_recipe(text_file), tmp_path / "run"
    check = LanguageTask.check

    def slow(task: LanguageTask) -> None:
        monkeypatch.setattr(LanguageTask, "check", check)
        train(make_recipe(text_file, seed=1), run)
        check(task)

    monkeypatch.setattr(LanguageTask, "check", slow)
    with pytest.raises(InputError, match="run holds a run; add --resume"):
        train(recipe, run)
    assert RunFolder(run).read_recipe().training.seed == 1
    assert RunFolder(run).results() is not None


def test_a_run_being_trained_is_not_held_by_another(text_file: Path, tmp_path: Path) -> None:
    class Look(Reporter):
        def trained(self, *_: Any) -> None:
            for options in ({}, {"to_read": True}):
                with (
                    pytest.raises(InputError, match="is being run by another process"),
                    RunFolder(tmp_path / "run").held(**options),
                ):
                    raise AssertionError

    assert train(make_recipe(text_file), tmp_path / "run", reporter=Look()).finished


class OutOfMemory(Reporter):
    def trained(self, step: int, *_: Any) -> None:
        raise RuntimeError("out of memory")


class FullDisk(Reporter):
    """The disk is full from the first step on."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch = patch

    def trained(self, step: int, *_: Any) -> None:
        def full(handle: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        self.patch.setattr(os, "fsync", full)


@pytest.mark.parametrize("how", ["crash", "memory", "disk", "divergence"])
def test_a_run_that_fails_before_its_first_evaluation_replaces_nothing(
    how: str, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    train(make_recipe(text_file), run)
    (run / "notes.txt").write_text("mine")
    before = snapshot(tmp_path)
    recipe = make_recipe(text_file, seed=5)
    reporter: Reporter = {"crash": StopAfter(2), "memory": OutOfMemory(), "disk": FullDisk(monkeypatch)}.get(
        how, Reporter()
    )
    error = {"crash": CrashError, "memory": RuntimeError, "disk": InputError, "divergence": DivergedError}[how]
    if how == "divergence":
        backward, calls = Trainer._backward, [0]

        def broken(self: Trainer) -> Any:
            calls[0] += 1
            return backward(self) * (float("nan") if calls[0] == 2 else 1)

        monkeypatch.setattr(Trainer, "_backward", broken)
    with pytest.raises(error) as failed:
        train(recipe, run, force=True, reporter=reporter)
    assert snapshot(tmp_path) == before
    assert not list(tmp_path.rglob(".*"))
    if how == "divergence":
        assert f"{run} keeps the run that was there" in str(failed.value)


def test_a_run_that_fails_later_has_replaced_the_old_one(text_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(make_recipe(text_file), run)
    recipe = make_recipe(text_file, seed=5)
    with pytest.raises(CrashError):
        train(recipe, run, force=True, reporter=StopAfter(4))
    assert RunFolder(run).results() is None
    assert train(recipe, run, resume=True).finished
    train(recipe, tmp_path / "unbroken")
    assert (run / "model.safetensors").read_bytes() == (tmp_path / "unbroken/model.safetensors").read_bytes()


def test_an_early_interrupt_keeps_the_old_run_and_says_so(text_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(make_recipe(text_file), run)
    before = snapshot(tmp_path)
    result = train(make_recipe(text_file, seed=5), run, force=True, reporter=InterruptAfter(2))
    assert (result.finished, result.saved, result.step) == (False, False, 2)
    assert snapshot(tmp_path) == before
    result = train(make_recipe(text_file, seed=5), run, force=True, reporter=InterruptAfter(4))
    assert (result.finished, result.saved, result.step) == (False, True, 4)


def test_a_run_in_a_folder_that_cannot_be_written_stays(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, run = make_recipe(text_file), tmp_path / "run"
    train(recipe, run)
    before = snapshot(tmp_path)
    access = os.access
    for folder in (run, run / "checkpoints"):
        with monkeypatch.context() as patch:  # root may write anything
            patch.setattr(os, "access", lambda path, mode, f=folder: Path(path) != f and access(path, mode))
            with pytest.raises(InputError, match=f"cannot write {folder}: Permission denied"):
                train(recipe, run, force=True)
        assert snapshot(tmp_path) == before
    mkdir = os.mkdir

    def refused(path: Any, *arguments: Any) -> None:
        if Path(path).parent == run:
            raise PermissionError(errno.EACCES, "Permission denied")
        mkdir(path, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "mkdir", refused)
        with pytest.raises(InputError, match=f"cannot write {run}: Permission denied"):
            train(recipe, run, force=True)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("diverged.json", "is a folder where a run has a file; move it away"),
        ("checkpoints", "is a file where a run has a folder; move it away"),
    ],
)
def test_what_stands_in_the_way_of_a_replacement_is_named(
    name: str, message: str, text_file: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(make_recipe(text_file), run)
    if name == "checkpoints":
        shutil.rmtree(run / name)
        (run / name).write_text("mine")
    else:
        (run / name).mkdir()
    before = snapshot(tmp_path)
    with pytest.raises(InputError, match=message):
        train(make_recipe(text_file), run, force=True)
    assert snapshot(tmp_path) == before


def test_a_run_hidden_by_a_killed_replacement_of_before_is_put_back(text_file: Path, tmp_path: Path) -> None:
    """kmixer renamed the old run to .run.old, and was killed there."""
    recipe, run = make_recipe(text_file), tmp_path / "run"
    train(recipe, run)
    (run / "notes.txt").write_text("mine")
    before = snapshot(tmp_path)
    run.rename(tmp_path / ".run.old")
    assert train(recipe, run, resume=True).finished
    assert snapshot(tmp_path) == before


def test_a_hang_up_saves_as_a_request_to_end_does(text_file: Path, tmp_path: Path) -> None:
    import signal

    class HangUp(Reporter):
        def trained(self, step: int, *_: Any) -> None:
            if step == 4:
                os.kill(os.getpid(), signal.SIGHUP)

    before = signal.getsignal(signal.SIGHUP)
    result = train(make_recipe(text_file), tmp_path / "run", reporter=HangUp())
    assert (result.step, result.finished, result.saved) == (4, False, True)
    assert signal.getsignal(signal.SIGHUP) == before
    assert train(make_recipe(text_file), tmp_path / "run", resume=True).finished
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        assert train(make_recipe(text_file), tmp_path / "other", reporter=HangUp()).finished
    finally:
        signal.signal(signal.SIGHUP, before)


def test_training_in_a_thread(text_file: Path, tmp_path: Path) -> None:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(train(make_recipe(text_file), tmp_path / "run")))
    thread.start()
    thread.join()
    assert results[0].finished
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.txt", "run"]


def test_two_processes_that_replace_one_run(text_file: Path, tmp_path: Path) -> None:
    """Real processes: one of them trains, the other is refused, and one whole run is there."""
    import tomli_w

    recipe, run = make_recipe(text_file, steps=40, evaluate_every=2), tmp_path / "run"
    train(make_recipe(text_file), run)
    file = tmp_path / "recipe.toml"
    file.write_text(tomli_w.dumps(recipe.model_dump(exclude_none=True)))
    command = [sys.executable, "-m", "kmixer", "train", str(file), "--out", str(run), "--force", "--cpu"]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    answers = [(process.communicate()[1], process.returncode) for process in processes]
    for error, code in answers:
        assert code == 0 or (code == 2 and "is being run by another process" in error), (error, code)
    assert 0 in [code for _, code in answers]
    check_run(RunFolder(run))
    assert RunFolder(run).read_recipe().training.steps == 40
    assert not list(tmp_path.glob(".*"))
