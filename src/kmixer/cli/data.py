"""kmixer data: the corpora, and the tasks that are generated."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from kmixer.cli.options import DataDir, Json
from kmixer.data.corpora import CORPORA, add_local_copy, find_corpus, is_local
from kmixer.data.listops import SHORT, ListOps, write_listops
from kmixer.errors import InputError

app = typer.Typer(help="The corpora: list them, get one; make a generated task.", no_args_is_help=True)


@app.command(name="list")
def list_corpora(data_dir: DataDir = None, as_json: Json = False) -> None:
    """List the registered corpora, and which of them are here.

    Example: kmixer data list
    """
    rows = [
        {"name": name, "here": is_local(name, data_dir), "description": entry.description, "licence": entry.licence}
        for name, entry in CORPORA.items()
    ]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        print(f"{row['name']:18}{'here' if row['here'] else '-':6}{row['description']} ({row['licence']})")
    print("\nAny text file or folder of text files works too: --set data.corpus=PATH")


@app.command()
def get(
    name: Annotated[str, typer.Argument(help="A registered corpus.")],
    source: Annotated[Path | None, typer.Option("--from", help="A copy you have: the file, or its folder.")] = None,
    data_dir: DataDir = None,
) -> None:
    """Find or fetch a corpus, check it, and say where it is.

    Example: kmixer data get tiny-shakespeare --from input.txt
    """
    corpus = add_local_copy(name, source, data_dir) if source else find_corpus(name, data_dir)
    for path in corpus.paths:
        print(path)


@app.command()
def make(
    task: Annotated[Literal["listops", "listops-short"], typer.Argument(help="Lengths 500 to 2000, or up to 512.")],
    out: Annotated[Path, typer.Option(help="Folder for the three .tsv files.")],
    seed: Annotated[int, typer.Option(help="The same seed gives the same files.")] = 0,
    examples: Annotated[int | None, typer.Option(help="For training; a 48th for validation and test.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace existing files.")] = False,
) -> None:
    """Generate a task as files: basic_train.tsv, basic_val.tsv and basic_test.tsv, columns Source and Target.

    Example: kmixer data make listops --seed 0 --out listops
    """
    chosen = ListOps() if task == "listops" else SHORT
    if examples is not None:
        held_out = max(1, examples // 48)
        chosen = replace(chosen, train=examples, validation=held_out, test=held_out)
    if not force and any(out.glob("basic_*.tsv")):
        raise InputError(f"{out} holds such files already; add --force to replace them, or choose another --out")
    for path in write_listops(out, chosen, seed):
        print(path)
