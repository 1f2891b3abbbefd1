"""A run is not tied to the folder it was begun in: its sha256 says whether a text is its own, wherever it lies."""

from __future__ import annotations

from pathlib import Path

import pytest

from kmixer.data.token_files import prepare_dataset
from kmixer.errors import InputError
from kmixer.runs.recipe import ImageRecipe, LanguageRecipe, load_recipe
from kmixer.runs.run_folder import RunFolder
from kmixer.training.loop import train
from tests.training.test_loop import CrashError, StopAfter, assert_same_run, make_recipe


@pytest.fixture
def recipe(text_file: Path, monkeypatch: pytest.MonkeyPatch) -> LanguageRecipe:
    """A recipe that names its text as it is seen from the text's folder."""
    monkeypatch.chdir(text_file.parent)
    return make_recipe(Path("corpus.txt"))


@pytest.fixture
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("elsewhere")


def test_it_is_read_and_resumed_from_another_folder(
    recipe: LanguageRecipe, elsewhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(recipe, tmp_path / "whole")
    RunFolder(tmp_path / "whole").check_recipe(recipe, but_for=("tokenizer.vocabulary_size",))  # a sweep that goes on
    with pytest.raises(CrashError):
        train(recipe, tmp_path / "run", reporter=StopAfter(4))
    monkeypatch.chdir(elsewhere)
    for run in (tmp_path / "run", tmp_path / "whole"):
        there = RunFolder(run).recipe_with_data()
        assert isinstance(there, LanguageRecipe)
        assert there.data.corpus == str(tmp_path / "corpus.txt")
        RunFolder(run).check_data(prepare_dataset(there.data, there.tokenizer).sha256)
    assert train(recipe, tmp_path / "run", resume=True).finished
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_a_text_that_was_moved_is_given(
    recipe: LanguageRecipe, elsewhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(recipe, tmp_path / "whole")
    with pytest.raises(CrashError):
        train(recipe, tmp_path / "run", reporter=StopAfter(4))
    moved = (tmp_path / "corpus.txt").rename(elsewhere / "moved.txt")
    gone = rf"was trained on {tmp_path / 'corpus.txt'}, which is not there; --corpus FILE says where it is now"
    with pytest.raises(InputError, match=gone):
        RunFolder(tmp_path / "run").recipe_with_data()
    with pytest.raises(InputError, match=gone):
        train(recipe, tmp_path / "run", resume=True)
    other = elsewhere / "other.txt"
    other.write_text(moved.read_text()[::-1])
    with pytest.raises(InputError, match=r"cannot resume .*: the data is not what it was; --corpus FILE says where"):
        train(recipe, tmp_path / "run", resume=True, corpus=str(other))
    there = RunFolder(tmp_path / "run").recipe_with_data(str(other))
    assert isinstance(there, LanguageRecipe)
    with pytest.raises(InputError, match=r"the data is not what .* was trained on"):
        RunFolder(tmp_path / "run").check_data(prepare_dataset(there.data, there.tokenizer).sha256)
    assert train(recipe, tmp_path / "run", resume=True, corpus=str(moved)).finished
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    # A recipe whose own path leads to another text that lies there meanwhile.
    (tmp_path / "corpus.txt").write_text(other.read_text())
    with pytest.raises(InputError, match="the data is not what it was"):
        train(recipe, tmp_path / "run", resume=True)


def test_a_new_run_on_another_text_than_its_recipe_says(
    recipe: LanguageRecipe, elsewhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (elsewhere / "mine.txt").write_text((tmp_path / "corpus.txt").read_text())
    monkeypatch.chdir(elsewhere)
    train(recipe, tmp_path / "run", corpus="mine.txt")
    there = RunFolder(tmp_path / "run").read_recipe()
    assert there.data_path == elsewhere / "mine.txt"


def test_registered_data_has_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    quick = load_recipe("shakespeare-quick")
    assert quick.data_path is None
    assert quick.with_whole_path() == quick
    images = load_recipe("vit-digits")
    assert images.data_path is None
    (tmp_path / "mine.npz").touch()
    mine = images.with_data_at("mine.npz")
    assert isinstance(mine, ImageRecipe)
    assert mine.with_whole_path().data_path == tmp_path / "mine.npz"
    with pytest.raises(InputError, match="recipe listops generates its data or finds it by name"):
        load_recipe("listops").with_data_at("mine.txt")
