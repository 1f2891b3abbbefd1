"""Files that others may have written: one line for anything that is not what it should be, and no hang."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kmixer import files
from kmixer.errors import InputError, one_line, shown
from kmixer.files import (
    expand_user,
    parse_json,
    parse_toml,
    read_bytes,
    read_json,
    read_json_lines,
    read_text,
    read_toml,
    user_cache,
)


def make_folder(path: Path) -> None:
    path.mkdir()


def make_loop(path: Path) -> None:
    path.symlink_to(path.name)


def make_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (os.mkfifo, "is a FIFO, not a regular file"),
        (make_folder, "is a folder, not a regular file"),
        (make_loop, "Too many levels of symbolic links"),
        (make_device, "is a device, not a regular file"),
        (lambda path: None, "is missing"),
    ],
)
@pytest.mark.parametrize("read", [read_text, read_json, read_json_lines, read_toml])
def test_only_regular_files_are_read(
    read: Callable[[Path], Any], make: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    make(tmp_path / "file")
    with pytest.raises(InputError, match=message):
        read(tmp_path / "file")


def test_names_and_rights(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the name is too long$"):
        read_text(tmp_path / ("a" * 300))
    with pytest.raises(InputError, match="Not a directory"):
        (tmp_path / "file").touch()
        read_text(tmp_path / "file" / "below")
    if os.geteuid() != 0:  # root may read all
        (tmp_path / "file").chmod(0)
        with pytest.raises(InputError, match="Permission denied"):
            read_text(tmp_path / "file")


def test_sizes_are_bounded(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 101)
    assert len(read_bytes(path, 101)) == 101
    with pytest.raises(InputError, match="has 101 bytes; allowed: 100 or fewer"):
        read_bytes(path, 100)
    with path.open("wb") as file:
        file.truncate(1 << 40)  # a sparse file
    with pytest.raises(InputError, match="has 1,099,511,627,776 bytes"):
        read_json(path)
    with pytest.raises(InputError, match="has more than 10 bytes"):
        read_bytes(Path("/proc/self/status"), 10)  # which has no size


@pytest.mark.parametrize("text", ["[" * 10_000, '{"a":' * 10_000, "[" * 100 + "]" * 100, "9" * 5_000, '"\\ud800"', "{"])
def test_json_that_is_no_document_of_ours_is_one_line(text: str) -> None:
    with pytest.raises(InputError, match=r"^name (is|holds) [^\n]{1,200}$"):
        parse_json(text, "name")


@pytest.mark.parametrize(
    "text", ["a = " + "[" * 10_000, "a = " + "9" * 5_000, "a" + ".a" * 10_000 + " = 1", "a = ", "[a" + ".b" * 40 + "]"]
)
def test_toml_that_is_no_recipe_is_one_line(text: str) -> None:
    with pytest.raises(InputError, match=r"^name(:| is) [^\n]{1,200}$"):
        parse_toml(text, "name")


def test_signs_beyond_sixteen_bits_are_read() -> None:
    assert parse_json('"\\ud83d\\ude00"', "name") == "\N{GRINNING FACE}"


@given(st.recursive(st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.text(), st.lists, max_leaves=20))
def test_documents_come_back(value: Any) -> None:
    try:
        text = json.dumps(value, ensure_ascii=False)
        text.encode()
    except UnicodeEncodeError:
        return
    assert parse_json(text, "name") == value


@pytest.mark.parametrize("text", ["[]", "5", "null", '"text"'])
def test_another_shape_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "file.jsonl").write_text('{"step": 1}\n' + text + "\n")
    with pytest.raises(InputError, match=r"file\.jsonl, line 2: holds .*, not a JSON object"):
        read_json_lines(tmp_path / "file.jsonl")


def test_a_line_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "file.jsonl").write_text('{"step": 1}\n{"step"')
    assert read_json_lines(tmp_path / "file.jsonl") == [{"step": 1}]
    (tmp_path / "file.jsonl").write_text("")
    assert read_json_lines(tmp_path / "file.jsonl") == []


def test_text_that_is_not_utf8_says_where(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match=r"is not UTF-8 text \(at byte 3\)"):
        read_text(tmp_path / "file")


def test_homes_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="there is no home folder ~nosuchuser; give the whole path"):
        expand_user(Path("~nosuchuser/text"))
    monkeypatch.delenv("XDG_CACHE_HOME")

    def no_home(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(files.Path, "expanduser", no_home)
    with pytest.raises(InputError, match="set HOME"):
        user_cache()


def test_foreign_text_is_quoted_and_cut() -> None:
    assert shown("a\nb\x1b[31m") == r"'a\nb\x1b[31m'"
    assert shown("x" * 1_000_000) == f"'{'x' * 200}'... (1,000,000 characters)"
    assert shown([1, "a"]) == "[1, 'a']"
    assert shown(10**5000) == "a int too large to show"
    assert one_line("a\nb\x1b[31m \N{RIGHT-TO-LEFT OVERRIDE}") == r"a\nb\x1b[31m \u202e"
    assert one_line("кириллица") == "кириллица"
    assert len(one_line("x" * 1_000_000)) < 5000
