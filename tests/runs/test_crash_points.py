"""A process killed at any change of the disk: the user's files stay, one run is whole, and the next command works.

Every operation is done again and again, killed at its 1st, 2nd, ... change of the disk, until it comes to its end.
"""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import pytest

import kmixer
from kmixer.errors import InputError
from kmixer.runs import publishing
from kmixer.runs.check import check_run
from kmixer.runs.layout import FILES
from kmixer.runs.recipe import LanguageRecipe, load_language_recipe
from kmixer.runs.run_folder import RunFolder
from kmixer.training.loop import train
from tests.runs.crashes import KilledError, dies_at, disk
from tests.training.test_loop import CrashError, StopAfter, make_recipe

# A user's files: in the run, among its checkpoints, under names that begin like the run's own, and beside it.
MINE = [
    "run/notes.txt",
    "run/report.html",
    "run/.hidden/deep/er.txt",
    "run/.notes.txt.abcdefgh.tmp",
    "run/.model.safetensors.mine.tmp",
    "run/checkpoints/epoch-3.safetensors",
    "run/checkpoints/.old/last.safetensors",
    ".run.new/notes.txt",
    ".run.old/notes.txt",
    "run.log",
]
PARTS = 4  # of the points, so that a test is short


def put_mine(parent: Path) -> None:
    for name in MINE:
        (parent / name).parent.mkdir(parents=True, exist_ok=True)
        (parent / name).write_text(f"mine: {name}")


def check_mine(parent: Path) -> None:
    lost = [name for name in MINE if not (parent / name).is_file() or (parent / name).read_text() != f"mine: {name}"]
    assert lost == []


def recipe_of(text_file: Path, rate: float) -> LanguageRecipe:
    return make_recipe(text_file, steps=2, evaluate_every=1, learning_rate=rate)


@pytest.fixture
def finished(text_file: Path, tmp_path: Path) -> Path:
    """A folder with a finished run and the user's files."""
    train(recipe_of(text_file, 0.01), tmp_path / "whole" / "run")
    put_mine(tmp_path / "whole")
    return tmp_path / "whole"


def own(run: Path) -> dict[str, bytes]:
    return {name: (run / name).read_bytes() for name in FILES if (run / name).is_file()}


def again(source: Path, target: Path) -> Path:
    """The folder as it was before."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    return target / "run"


def assert_whole(run: Path, old: dict[str, bytes]) -> bool:
    """Either run is whole, the old one to its last byte; whether it is the old one."""
    check_run(RunFolder(run))
    kmixer.load(run)
    if own(run)["recipe.toml"] == old["recipe.toml"]:
        assert own(run) == old
        return True
    return False


@pytest.mark.parametrize("part", range(PARTS))
def test_training_that_replaces_a_run(part: int, finished: Path, text_file: Path, tmp_path: Path) -> None:
    old, work = own(finished / "run"), tmp_path / "work"
    replacing = recipe_of(text_file, 0.02)
    seen = set()
    for point in itertools.count(part, PARTS):
        run = again(finished, work)
        killed = dies_at(point, lambda: train(replacing, work / "run", force=True), lambda: check_mine(work))
        check_mine(work)
        is_old = assert_whole(run, old)
        seen.add(is_old)
        if not killed:
            break
        match point // PARTS % 3:
            case 0:
                assert train(recipe_of(text_file, 0.01 if is_old else 0.02), run, resume=True).finished
            case 1:
                assert train(replacing, run, force=True).finished
            case 2:
                with RunFolder(run).held():
                    pass
        assert_whole(run, old)
        check_mine(work)
        assert not list(work.rglob(".kmixer-*"))
    assert seen == {True, False}
    assert RunFolder(run).results() is not None


def test_a_replacement_visits_every_kind_of_change(finished: Path, text_file: Path, tmp_path: Path) -> None:
    run = again(finished, tmp_path / "work")
    with disk(watch=lambda: check_mine(tmp_path / "work")) as counted:
        train(recipe_of(text_file, 0.02), run, force=True)
    assert set(counted.made) == {"open", "mkdir", "rename", "replace", "unlink", "rmdir", "fsync"}
    check_mine(tmp_path / "work")


@pytest.mark.parametrize("part", range(PARTS))
def test_resuming(part: int, text_file: Path, tmp_path: Path) -> None:
    recipe, begun, work = recipe_of(text_file, 0.01), tmp_path / "begun", tmp_path / "work"
    train(recipe, tmp_path / "unbroken")
    with pytest.raises(CrashError):
        train(recipe, begun / "run", reporter=StopAfter(2))
    put_mine(begun)
    weights = (tmp_path / "unbroken/model.safetensors").read_bytes()
    for point in itertools.count(part, PARTS):
        run = again(begun, work)
        killed = dies_at(point, lambda: train(recipe, work / "run", resume=True), lambda: check_mine(work))
        check_mine(work)
        check_run(RunFolder(run))
        kmixer.load(run)
        assert train(recipe, run, resume=True).finished
        assert (run / "model.safetensors").read_bytes() == weights
        check_mine(work)
        if not killed:
            break


def test_a_first_run(text_file: Path, tmp_path: Path) -> None:
    """Killed before its first checkpoint it leaves no run, and afterwards one that resumes."""
    recipe = make_recipe(text_file, steps=1, evaluate_every=1)
    train(recipe, tmp_path / "data-is-there-now")
    for point in itertools.count(0, 3):
        work = tmp_path / f"work-{point}"
        if not dies_at(point, lambda work=work: train(recipe, work / "run")):
            break
        there = RunFolder(work / "run").exists()
        assert there == (work / "run").exists()
        if there:
            check_run(RunFolder(work / "run"))
        if point % 2:
            assert train(recipe, work / "run", resume=there).finished
            assert not list(work.rglob(".*"))


def test_converting_over_a_run(finished: Path, text_file: Path, tmp_path: Path) -> None:
    from kmixer.interop.koneko import convert
    from tests.cli.test_commands import koneko_checkpoint

    koneko_checkpoint(tmp_path / "theirs.pt", vocabulary=256)
    settings = ["tokenizer.kind=byte", "tokenizer.vocabulary_size=256", "model.width=8", "model.layers=2"]
    settings += ["model.rank=3", "model.base_kernel.size=8", f"data.corpus={text_file}"]
    recipe = load_language_recipe("k-operators-local-bytes", settings)
    old, work = own(finished / "run"), tmp_path / "work"
    run = again(finished, work)
    with RunFolder(run).held(), pytest.raises(InputError, match="is being run by another process"):
        convert(tmp_path / "theirs.pt", recipe, run, force=True)
    seen = set()
    for point in itertools.count():
        run = again(finished, work)
        killed = dies_at(
            point,
            lambda: convert(tmp_path / "theirs.pt", recipe, work / "run", force=True),
            lambda: check_mine(work),
        )
        check_mine(work)
        seen.add(assert_whole(run, old))
        check_mine(work)
        if not killed:
            break
    assert seen == {True, False}


def test_a_kill_while_another_is_being_recovered(finished: Path, text_file: Path, tmp_path: Path) -> None:
    """The replacement itself, killed at every point, and its recovery at every third again."""
    old, replacing = own(finished / "run"), recipe_of(text_file, 0.02)
    ready, torn, work = (tmp_path / name for name in ("ready", "torn", "work"))
    run = again(finished, ready)

    def stop_before(folder: Path, place: Path) -> None:
        raise KilledError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(publishing, "publish", stop_before)
        patch.setattr(publishing, "_remove_staged", lambda place: None)
        with pytest.raises(KilledError):
            train(replacing, run, force=True)
    staged = own(run / ".kmixer-new")

    def publish() -> None:
        publishing.publish(work / "run" / ".kmixer-new", work / "run")

    def recover() -> None:
        publishing.recover(work / "run")

    for first in itertools.count():
        again(ready, work)
        killed = dies_at(first, publish, lambda: check_mine(work))
        shutil.rmtree(torn, ignore_errors=True)
        shutil.copytree(work, torn)
        for second in itertools.count(first % 3, 3):
            again(torn, work)
            died = dies_at(second, recover, lambda: check_mine(work))
            recover()
            check_mine(work)
            kept = own(work / "run")
            assert kept in (staged, old)
            assert not list((work / "run").glob(".kmixer-*"))
            if not died:
                break
        if not killed:
            break
    assert kept == staged
