"""kmixer data make: files that are generated, and not written over."""

from __future__ import annotations

from pathlib import Path

from tests.cli.conftest import Run


def test_listops_files(kmixer_command: Run, tmp_path: Path) -> None:
    options = ["data", "make", "listops-short", "--seed", 3, "--examples", 10]
    answer = kmixer_command(*options, "--out", tmp_path / "a")
    assert answer.out.split() == [str(tmp_path / "a" / f"basic_{part}.tsv") for part in ("train", "val", "test")]
    assert len((tmp_path / "a/basic_train.tsv").read_text().splitlines()) == 11
    assert len((tmp_path / "a/basic_test.tsv").read_text().splitlines()) == 2
    before = (tmp_path / "a/basic_train.tsv").read_bytes()
    said = kmixer_command(*options, "--out", tmp_path / "a").error()
    assert "holds such files already; add --force to replace them" in said
    assert kmixer_command(*options, "--out", tmp_path / "a", "--force").code == 0
    assert (tmp_path / "a/basic_train.tsv").read_bytes() == before
    assert "allowed: 1 example or more" in kmixer_command(*options[:-1], 0, "--out", tmp_path / "b").error()
