"""Files and folders as text: marks, endings, links, fields, and where they cannot be read."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kmixer.data import reading
from kmixer.data.corpora import find_corpus
from kmixer.data.reading import decode_blocks, lines_of, text_source
from kmixer.errors import InputError


def text_of(path: Path, **options: str) -> str:
    return "".join(map(str, find_corpus(str(path), **options).read()))  # type: ignore[arg-type]


def write(folder: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8", newline="")


@given(st.text(), st.integers(1, 9))
def test_text_comes_in_blocks_that_join_to_it(text: str, size: int) -> None:
    text = text.encode("utf-8", "ignore").decode()

    class Slow(io.BytesIO):
        def read1(self, length: int | None = -1) -> bytes:
            return super().read1(size)

    assert "".join(decode_blocks(Slow(b"\xef\xbb\xbf" + text.encode()), "x", 100)) == text
    assert (
        list(lines_of(text[i : i + size] for i in range(0, len(text), size)))
        == io.StringIO(text, newline="\n").readlines()
    )


def test_a_byte_order_mark_is_left_out_at_the_start_of_a_file_only(tmp_path: Path) -> None:
    write(tmp_path, {"a.txt": "\ufeffone\n", "b.txt": "\ufefftwo \ufeff\n"})
    assert text_of(tmp_path) == "one\ntwo \ufeff\n"
    assert text_of(tmp_path / "a.txt") == "one\n"


@pytest.mark.parametrize(("raw", "offset"), [(b"caf\xe9 noir", 3), (b"\xffx", 0), (b"ok \xe2\x82", 3)])
def test_what_is_not_utf8_is_named_with_its_offset(
    tmp_path: Path, raw: bytes, offset: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes(raw)
    for size in (1, 2, 1 << 20):
        monkeypatch.setattr(reading, "READ_BYTES", size)
        with pytest.raises(InputError, match=rf"latin\.txt is not UTF-8 text at byte {offset}; .* data\.encoding"):
            text_of(path)


def test_a_folder_is_its_text_files_whatever_their_endings_case_once_each(tmp_path: Path) -> None:
    write(
        tmp_path / "text",
        {
            "a.txt": "a",
            "B.TXT": "b\n",
            "sub/c.Md": "c",
            "code.py": "x = 1\n",
            ".hidden.txt": "no",
            ".ipynb_checkpoints/a-checkpoint.txt": "no",
        },
    )
    write(tmp_path / "elsewhere", {"d.txt": "d"})
    (tmp_path / "text" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "text" / "0-again").symlink_to(tmp_path / "text" / "sub")
    (tmp_path / "text" / "twice.txt").symlink_to(tmp_path / "text" / "a.txt")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "text")
    (tmp_path / "elsewhere" / "self").symlink_to(tmp_path / "elsewhere" / "self")
    (tmp_path / "text" / "nothing.txt").symlink_to(tmp_path / "gone")
    os.mkfifo(tmp_path / "text" / "pipe.txt")
    corpus = find_corpus(str(tmp_path / "text"))
    assert corpus.names == ["B.TXT", "a.txt", "linked/d.txt", "sub/c.Md"]
    assert text_of(tmp_path / "text") == "b\na\nd\nc"


def test_a_pattern_takes_other_files(tmp_path: Path) -> None:
    write(tmp_path, {"a.py": "a\n", "sub/B.PY": "b\n", "sub/c.txt": "c\n"})
    assert text_of(tmp_path, files="*.py") == "a\nb\n"
    assert text_of(tmp_path, files="sub/*") == "b\nc\n"
    with pytest.raises(InputError, match=r"holds no files that match \*\.rs"):
        find_corpus(str(tmp_path), files="*.rs")
    with pytest.raises(InputError, match=r"data\.files: got '\*\.py' with corpus .*a\.py; it goes with a folder"):
        find_corpus(str(tmp_path / "a.py"), files="*.py")


def test_a_field_of_json_lines_and_of_tables_is_the_text(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "a.jsonl": '{"text": "one\\ntwo", "n": 1}\n\n{"text": "\\ud800half"}\n',
            "b.csv": 'id,text\n1,"three, four"\n2,"five\nsix"\n',
            "c.tsv": "text\tid\nseven\t1\n",
            "d.txt": "not this",
        },
    )
    assert text_of(tmp_path, field="text") == "one\ntwo\n?half\nthree, four\nfive\nsix\nseven\n"
    with pytest.raises(InputError, match=r"a\.jsonl, line 1: no text under data\.field 'body'; it has text, n"):
        text_of(tmp_path / "a.jsonl", field="body")
    with pytest.raises(InputError, match=r"b\.csv: no column 'body' \(data\.field\); it has id, text"):
        text_of(tmp_path / "b.csv", field="body")
    for line in ("{", "[1]", "[" * 100_000, '{"text": 1' + "0" * 10_000 + "}"):
        write(tmp_path, {"e.jsonl": line})
        with pytest.raises(InputError, match=r"e\.jsonl, line 1"):
            text_of(tmp_path / "e.jsonl", field="text")
    with pytest.raises(InputError, match="it goes with files of your own"):
        find_corpus("python-docs", field="text")


def test_only_regular_files_and_folders_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(InputError, match="not a regular file"):
            find_corpus(str(path))


def test_a_text_in_a_home_folder_that_is_not_there() -> None:
    with (
        pytest.raises(InputError, match="there is no home folder ~nosuchuser"),
        text_source("~nosuchuser/x", raw=False),
    ):
        pass
