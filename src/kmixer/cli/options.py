"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kmixer.generation.speculation import RULES
from kmixer.models.causal_lm import DecodedIn

DataDir = Annotated[
    Path | None, typer.Option(help="Folder of the corpora; default: the user's cache folder, kmixer below it.")
]
FigureFile = Annotated[
    Path | None, typer.Option("--figure", metavar="FILE", help="Draw it into this .svg or .png file.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
RecipeName = Annotated[str, typer.Argument(help="A packaged recipe (see kmixer recipes), or a .toml file.")]
RecipeOrFrom = Annotated[
    str | None,
    typer.Argument(metavar="[RECIPE]", help="A packaged recipe (see kmixer recipes), or a .toml file."),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the recipe; KEY= goes back to its default."),
]
Draft = Annotated[
    str | None,
    typer.Option(
        metavar="RUN|NAME", help="What proposes tokens: a run, ngram:5, lookup, self:2, or a file of kmixer ngram."
    ),
]
Accept = Annotated[str, typer.Option(metavar="RULE", help=f"How drafted tokens are judged: {', '.join(RULES)}.")]
Delta = Annotated[float | None, typer.Option(help="Of cactus: nats that one drafted token may spend.")]
Bound = Annotated[float | None, typer.Option(help="Of bounded: nats between what is emitted and the model.")]
Mix = Annotated[float | None, typer.Option(help="Of interp: the part of the draft, 0 to 1.")]
ExactGamma = Annotated[bool, typer.Option("--exact-gamma", help="Of cactus: solve for gamma.")]
Run = Annotated[Path, typer.Argument(help="A run folder.")]
RunOrPackaged = Annotated[Path, typer.Argument(help="A run folder, or a packaged model: shakespeare-small-copy.")]
Weights = Annotated[
    DecodedIn,
    typer.Option(help="Of matrices as they are decoded with: of fewer bits they are read faster, keys and values too."),
]
Cpu = Annotated[bool, typer.Option("--cpu", help="Stay on the CPU.")]
Threads = Annotated[int, typer.Option(help="Threads of this process.")]
Repeats = Annotated[int, typer.Option(help="Timed calls, after the first.")]
TrackOut = Annotated[Path, typer.Option(help="Folder that the libraries write into.")]
