"""Archives made to do harm, and damaged runs: refused in constant memory, with nothing written."""

from __future__ import annotations

import gzip
import io
import shutil
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from kmixer.errors import InputError
from kmixer.runs import archive as archives
from kmixer.runs.archive import pack, unpack
from kmixer.runs.run_folder import FILES, RunFolder
from kmixer.training.loop import train
from tests.training.test_loop import make_recipe


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, text: str) -> Path:
    folder = tmp_path_factory.mktemp("archive")
    (folder / "corpus.txt").write_text(text, encoding="utf-8")
    train(make_recipe(folder / "corpus.txt", steps=2), folder / "run")
    return folder / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def refused(archive: Path) -> str:
    """Why an archive is refused; nothing is written, and little memory taken."""
    before = sorted(archive.parent.iterdir())
    tracemalloc.start()
    with pytest.raises(InputError) as raised:
        unpack(archive, archive.parent / "out")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20
    assert sorted(archive.parent.iterdir()) == before
    assert "\n" not in str(raised.value)
    return str(raised.value)


def gzipped(path: Path, *parts: bytes) -> Path:
    with gzip.open(path, "wb") as file:
        for part in parts:
            file.write(part)
    return path


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def test_sizes_that_a_header_claims_are_bounded(tmp_path: Path) -> None:
    archive = tmp_path / "run.tar.gz"
    gzipped(archive, header("model.safetensors", 10 << 40))
    assert "its model.safetensors has 10,995,116,277,760 bytes; allowed: 68,719,476,736" in refused(archive)
    gzipped(archive, header("recipe.toml", 2 << 20))
    assert "its recipe.toml has 2,097,152 bytes; allowed: 1,048,576 or fewer" in refused(archive)
    gzipped(archive, header("model.safetensors", 10 << 40, tarfile.GNUTYPE_SPARSE))
    assert "holds the entry 'model.safetensors', which no run has" in refused(archive)


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE])
def test_headers_and_names_of_a_gigabyte_are_not_read(kind: bytes, tmp_path: Path) -> None:
    zeros = bytes(1 << 20)
    archive = gzipped(tmp_path / "run.tar.gz", header("x", 1 << 30, kind), *[zeros] * 64)
    assert "run.tar.gz: it holds" in refused(archive)


@pytest.mark.parametrize("key", ["path", "size", "linkpath", "GNU.sparse.realsize", "GNU.sparse.name"])
def test_headers_that_rename_or_resize_are_refused(key: str, tmp_path: Path) -> None:
    record = f" {key}=1\n"
    record = f"{len(record) + 2}{record}"
    content = record.encode().ljust(512, b"\0")
    archive = gzipped(tmp_path / "run.tar.gz", header("x", len(record), tarfile.XHDTYPE), content)
    assert "a name or a size of its own" in refused(archive)


def test_what_unpacks_to_a_thousand_times_its_size_is_refused(tmp_path: Path) -> None:
    size = 200 << 20
    parts = [bytes(1 << 20)] * 200
    archive = gzipped(tmp_path / "run.tar.gz", header("metrics.jsonl", size), *parts)
    assert archive.stat().st_size < 1 << 20
    assert "it unpacks to more than 100 times its size" in refused(archive)
    archive = gzipped(tmp_path / "run.tar.gz", bytes(1024), *parts)  # an archive without entries, zeros after its end
    assert "it unpacks to more than 100 times its size" in refused(archive)


def test_what_follows_the_end_is_refused(run: Path, tmp_path: Path) -> None:
    pack(run, tmp_path / "run.tar.gz")
    whole = (tmp_path / "run.tar.gz").read_bytes()
    (tmp_path / "run.tar.gz").write_bytes(whole + whole)
    assert "it goes on after its end" in refused(tmp_path / "run.tar.gz")
    (tmp_path / "run.tar.gz").write_bytes(gzip.compress(gzip.decompress(whole) + b"x"))
    assert "it goes on after its end" in refused(tmp_path / "run.tar.gz")


def test_names_are_quoted_and_cut(tmp_path: Path) -> None:
    archive = gzipped(tmp_path / "run.tar.gz", header("\x1b[31m\n", 0))
    assert r"holds the file '\x1b[31m\n', which no run has: refused" in refused(archive)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)


def without_first_line(path: Path) -> None:
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))


def of_another_seed(path: Path) -> None:
    path.write_text(path.read_text().replace('"seed": 42', '"seed": 43'))


DAMAGE: list[tuple[str, Callable[[Path], None], str]] = [
    ("model.safetensors", flip, "model.safetensors was changed after it was written"),
    ("checkpoints/last.safetensors", cut, "last.safetensors is damaged"),
    ("checkpoints/last.safetensors", flip, "last.safetensors was changed after it was written"),
    ("metrics.jsonl", cut, "metrics.jsonl was shortened or edited since the last checkpoint"),
    ("metrics.jsonl", without_first_line, "metrics.jsonl was shortened or edited since the last checkpoint"),
    (
        "metrics.jsonl",
        lambda path: path.write_text("[]\n") and None,
        r"holds a list, not a JSON object|metrics\.jsonl was shortened or edited",
    ),
    ("results.json", cut, r"results\.json is not valid JSON"),
    ("results.json", of_another_seed, r"results\.json (is of seed 43, recipe\.toml of 42|was changed after)"),
    ("environment.json", lambda path: path.write_text("5") and None, r"environment\.json (holds|was changed)"),
    (
        "tokenizer.json",
        lambda path: path.write_text("null") and None,
        r"tokenizer\.json (does not describe a tokenizer|was changed)",
    ),
]


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGE)
def test_damaged_runs_are_neither_packed_nor_unpacked(
    name: str, damage: Callable[[Path], None], message: str, run: Path, tmp_path: Path
) -> None:
    damage(run / name)
    with pytest.raises(InputError, match=message):
        pack(run, tmp_path / "run.tar.gz")
    assert not (tmp_path / "run.tar.gz").exists()
    with tarfile.open(tmp_path / "run.tar.gz", "w:gz") as tar:
        for file in FILES:
            if (run / file).is_file():
                tar.add(run / file, arcname=file)
    with pytest.raises(InputError, match=message) as raised:
        unpack(tmp_path / "run.tar.gz", tmp_path / "out")
    assert "run.tar.gz holds a damaged run: " in str(raised.value)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".unpacking*"))


def test_a_run_in_use_is_not_packed(run: Path, tmp_path: Path) -> None:
    with RunFolder(run).held(), pytest.raises(InputError, match="is being run by another process"):
        pack(run, tmp_path / "run.tar.gz")
    pack(run, tmp_path / "run.tar.gz")
    with RunFolder(tmp_path / "out").held(), pytest.raises(InputError, match="is being run by another process"):
        unpack(tmp_path / "run.tar.gz", tmp_path / "out")
    unpack(tmp_path / "run.tar.gz", tmp_path / "out")


@pytest.mark.parametrize("what", ["folder", "file", "link"])
def test_what_appears_meanwhile_is_not_replaced(
    what: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(run, tmp_path / "run.tar.gz")
    out, check = tmp_path / "out", archives.check_run

    def appear(folder: RunFolder) -> None:
        check(folder)
        if what == "folder":
            out.mkdir()
            (out / "notes").write_text("mine")
        elif what == "file":
            out.write_text("mine")
        else:
            out.symlink_to(run)

    monkeypatch.setattr(archives, "check_run", appear)
    with pytest.raises(InputError, match="was made by another process meanwhile; choose another --out"):
        unpack(tmp_path / "run.tar.gz", out)
    assert (out / "notes" if what == "folder" else out).exists()
    assert out.is_symlink() == (what == "link")


def test_archives_of_other_tools_are_read(run: Path, tmp_path: Path) -> None:
    """GNU and old headers, no times of a fraction of a second, files in another order, the least compression."""
    for format in (tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(tmp_path / "run.tar.gz", "w:gz", format=format, compresslevel=1) as tar:
            for name in reversed(FILES):
                if (run / name).is_file():
                    content = (run / name).read_bytes()
                    info = tarfile.TarInfo(name)
                    info.size, info.mtime = len(content), 1.5 if format == tarfile.PAX_FORMAT else 1
                    tar.addfile(info, io.BytesIO(content))
        unpack(tmp_path / "run.tar.gz", tmp_path / "out")
        assert (tmp_path / "out" / "metrics.jsonl").read_bytes() == (run / "metrics.jsonl").read_bytes()
        shutil.rmtree(tmp_path / "out")
