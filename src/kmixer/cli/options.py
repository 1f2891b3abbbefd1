"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

DataDir = Annotated[
    Path | None, typer.Option(help="Folder of the corpora; default: the user's cache folder, kmixer below it.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
RecipeName = Annotated[str, typer.Argument(help="A packaged recipe (see kmixer recipes), or a .toml file.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the recipe; KEY= goes back to its default."),
]
Run = Annotated[Path, typer.Argument(help="A run folder.")]
RunOrPackaged = Annotated[Path, typer.Argument(help="A run folder, or a packaged model: shakespeare-small-copy.")]
Cpu = Annotated[bool, typer.Option("--cpu", help="Stay on the CPU.")]
