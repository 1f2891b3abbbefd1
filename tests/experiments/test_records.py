"""The records in docs/runs: small, thinned, and the results page made again from them is the one in docs."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path

import pytest

from kmixer.errors import InputError
from kmixer.experiments.results import write_results_page

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_of_results_is_made_from_the_records(tmp_path: Path) -> None:
    for name in ("results.toml", "results.json"):
        shutil.copy(DOCS / name, tmp_path / name)
    (tmp_path / "runs").symlink_to(DOCS / "runs")
    write_results_page(tmp_path / "results.toml", tmp_path / "results.md")
    for name in ("results.md", "results.json"):
        assert (tmp_path / name).read_bytes() == (DOCS / name).read_bytes(), name


def test_records_are_small_and_thinning_them_again_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(DOCS / "runs", tmp_path / "runs")
    files = {path: path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file()}
    assert sum(map(len, files.values())) < 2_000_000
    monkeypatch.setattr("sys.argv", ["thin.py", str(tmp_path / "runs")])
    runpy.run_path(str(DOCS / "runs" / "thin.py"), run_name="__main__")
    assert {path: path.read_bytes() for path in files} == files


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        ([], "is not a file of results"),
        ({"h2": 5}, "h2: the whole: got 5"),
        ({"h2": {"command": "kmixer"}}, "h2: arms is missing"),
        ({"h2": [{"mixer": "K2"}]}, "h2: rows.0.parameters is missing"),
    ],
)
def test_a_file_of_kept_tables_that_is_something_else_is_one_line(tmp_path: Path, kept: object, said: str) -> None:
    shutil.copy(DOCS / "results.toml", tmp_path / "results.toml")
    (tmp_path / "results.json").write_text(json.dumps(kept))
    with pytest.raises(InputError, match=said):
        write_results_page(tmp_path / "results.toml", tmp_path / "results.md")
    assert not (tmp_path / "results.md").exists()
