"""kmixer data: the corpora."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from kmixer.cli.options import DataDir, Json
from kmixer.data.corpora import CORPORA, add_local_copy, find_corpus, is_local

app = typer.Typer(help="The corpora: list them, get one.", no_args_is_help=True)


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
