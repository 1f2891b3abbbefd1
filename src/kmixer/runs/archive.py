"""A run in one .tar.gz file, and back. Unpacking accepts a run's own files and nothing else."""

from __future__ import annotations

import contextlib
import gzip
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from kmixer.errors import InputError
from kmixer.files import atomic_write, describe_write_error
from kmixer.models.model_folder import CONFIG, TOKENIZER, WEIGHTS, load_weights
from kmixer.runs.recipe import AnyRecipe, LanguageRecipe
from kmixer.runs.run_folder import FILES, RECIPE, RunFolder

NEEDED = {RECIPE, CONFIG, WEIGHTS}


def _needed(recipe: AnyRecipe) -> set[str]:
    """The files without which a run is none: classifiers have no tokenizer."""
    return NEEDED | ({TOKENIZER} if isinstance(recipe, LanguageRecipe) else set())


def pack(run: Path, archive: Path, *, force: bool = False) -> None:
    """Write the files of a run into an archive. Raises InputError for a run that `unpack` would not take."""
    if missing := [name for name in sorted(_needed(RunFolder(run).read_recipe())) if not (run / name).is_file()]:
        raise InputError(f"{run} cannot be packed: {', '.join(missing)} is missing")
    if archive.resolve().is_relative_to(run.resolve()):
        raise InputError(f"{archive} lies inside the run; choose --out elsewhere")
    if archive.exists() and not force:
        raise InputError(f"{archive} exists; add --force to replace it, or choose --out")
    with atomic_write(archive) as file, tarfile.open(fileobj=file, mode="w:gz", dereference=True) as tar:
        for name in FILES:
            path = run / name
            if path.is_file():
                tar.add(path, arcname=name, recursive=False)


@contextlib.contextmanager
def _folder_beside(run: Path) -> Iterator[Path]:
    """A temporary folder on the disk of a run."""
    try:
        run.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(dir=run.parent, prefix=".unpacking-")
    except OSError as error:
        raise describe_write_error(error, run) from error
    with temporary as name:
        yield Path(name)


def unpack(archive: Path, run: Path) -> None:
    """Make a run folder from an archive.

    Raises:
        InputError: the archive cannot be read, holds anything but the plain files of a run (a
            symlink, a path with `..`, a pickle), or the folder holds something already.
    """
    RunFolder(run).check_free(force=False)
    try:
        with gzip.open(archive) as file:
            while file.read(1 << 20):  # to the end, where the checksum is: tarfile would stop at damage
                pass
        with tarfile.open(archive, mode="r:gz") as tar:
            members = tar.getmembers()
            for member in members:
                if not member.isfile() or member.name not in FILES:
                    kind = "file" if member.isfile() else "link" if member.islnk() or member.issym() else "entry"
                    raise InputError(f"{archive} holds the {kind} {member.name!r}, which no run has: refused")
            names = [member.name for member in members]
            if not set(names) >= NEEDED or len(set(names)) != len(names):
                raise InputError(f"{archive} is not a run archive: it needs {', '.join(sorted(NEEDED))}, each once")
            with _folder_beside(run) as folder:
                whole = folder / "run"
                for member in members:
                    source = tar.extractfile(member)
                    assert source is not None
                    with source, atomic_write(whole / member.name) as target:
                        shutil.copyfileobj(source, target)
                if missing := _needed(RunFolder(whole).read_recipe()) - set(names):
                    raise InputError(f"{archive} is not a run archive: {', '.join(sorted(missing))} is missing")
                load_weights(whole)
                whole.rename(run)
    except FileNotFoundError:
        raise InputError(f"{archive} is missing") from None
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise InputError(f"{archive} cannot be read as a run archive ({error})") from None
