"""kmixer convert, pack, unpack: runs from elsewhere, and runs on their way."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from kmixer.cli.options import DataDir, Run, Settings
from kmixer.files import is_there
from kmixer.interop.koneko import convert as convert_checkpoint
from kmixer.runs.archive import pack as pack_run
from kmixer.runs.archive import unpack as unpack_run
from kmixer.runs.recipe import load_language_recipe
from kmixer.runs.run_folder import CHECKPOINT, ENVIRONMENT, METRICS, RESULTS


def convert(
    file: Annotated[Path, typer.Argument(help="A checkpoint of Koneko's code (.pt).")],
    recipe: Annotated[str, typer.Option(help="The recipe that describes it.")],
    out: Annotated[Path, typer.Option(help="Run folder to make.")],
    settings: Settings = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the run that is in the run folder.")] = False,
    data_dir: DataDir = None,
) -> None:
    """Turn one of Koneko's later checkpoints (short base kernel, copy branch off) into a run folder.

    Example: kmixer convert char.pt --recipe k-operators-local-shakespeare --out runs/koneko
    """
    for line in convert_checkpoint(file, load_language_recipe(recipe, settings), out, force=force, data_dir=data_dir):
        print(line)


def pack(
    run: Run,
    out: Annotated[Path, typer.Option(help="Archive to make, .tar.gz.")],
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Put a run into one archive, to send or to keep.

    Example: kmixer pack runs/shakespeare-quick-seed42 --out quick.tar.gz
    """
    pack_run(run, out, force=force)
    if absent := [name for name in (METRICS, ENVIRONMENT, RESULTS, CHECKPOINT) if not is_there(run / name)]:
        print(f"packed without {', '.join(absent)}, which {run} has not", file=sys.stderr)
    print(out)


def unpack(
    archive: Annotated[Path, typer.Argument(help="An archive that kmixer pack made.")],
    out: Annotated[Path, typer.Option(help="Run folder to make.")],
) -> None:
    """Unpack a run archive; anything but a run's own files is refused.

    Example: kmixer unpack quick.tar.gz --out runs/quick
    """
    unpack_run(archive, out)
    print(out)
