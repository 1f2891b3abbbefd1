"""kmixer lab overlap: how alike the tokens of a sequence become with depth."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kmixer.cli.lab_options import (
    TARGET_HELP,
    FigureFile,
    MovedCorpus,
    Save,
    check_figure,
    check_recipe,
    check_run,
    deliver,
    headline,
    is_recipe,
    numbers,
)
from kmixer.cli.options import DataDir, Json, Settings
from kmixer.errors import InputError
from kmixer.runs.lab import OverlapRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEANING = """\
overlap: mean cosine between different tokens of a sequence; across: between tokens of different sequences, which is
what is common to all text; excess: their difference, which is what the context does. That a model mixes much or little
says nothing about its loss."""


def overlap(
    target: Annotated[
        str | None,
        typer.Argument(metavar="RUN|RECIPE", help=TARGET_HELP),
    ] = None,
    depth: Annotated[
        str | None, typer.Option(metavar="6,24", help="Of a recipe: layers; default: as many as it has.")
    ] = None,
    mixers: Annotated[
        str | None, typer.Option(metavar="softmax,k2", help="Of a transformer's recipe: a curve for each.")
    ] = None,
    inits: Annotated[int, typer.Option(min=1, help="Of a recipe: initialisations.")] = 8,
    windows: Annotated[int, typer.Option(min=2, help="Of validation text.")] = 8,
    window: Annotated[int | None, typer.Option(min=2, help="Positions of a sequence; default: 64.")] = None,
    toy: Annotated[
        bool, typer.Option("--toy", help="A model of attention at random instead, beside its laws.")
    ] = False,
    settings: Settings = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the first initialisation.")] = 0,
    save: Save = False,
    figure: FigureFile = None,
    corpus: MovedCorpus = None,
    as_json: Json = False,
    data_dir: DataDir = None,
) -> None:
    """Measure how alike tokens become with depth, beside mean-field theory where that applies.

    Example: kmixer lab overlap transformer-plays --mixers softmax,gaussian,k2 --figure overlap.svg
    """
    from kmixer.analysis.lab_inputs import Asked
    from kmixer.analysis.overlap import overlap_of_recipe, overlap_of_run, overlap_of_toy

    check_figure(figure)
    asked = Asked(inits, windows, window=window, seed=seed)
    if toy != (target is None):
        raise InputError("overlap: give a run or a recipe, or --toy alone")
    if target is None:
        measured = overlap_of_toy(seed)
    elif is_recipe(target):
        check_recipe(save=save, corpus=corpus)
        kinds = [kind.strip() for kind in mixers.split(",")] if mixers else []
        measured = overlap_of_recipe(target, settings or [], numbers("--depth", depth, int), kinds, asked, data_dir)
    else:
        check_run(target, {"--depth": depth, "--mixers": mixers, "--set": settings}, save=save)
        measured = overlap_of_run(Path(target), asked, corpus, data_dir)
    save_in = Path(target) if save and target is not None else None
    deliver(measured, OverlapRecord, _draw, _print, figure=figure, save_in=save_in, as_json=as_json)


def _draw(record: OverlapRecord) -> Figure:
    from kmixer.analysis.panels.lab import labelled
    from kmixer.analysis.panels.overlap import draw_overlap

    return draw_overlap(labelled(record))


def _print(measured: dict[str, Any]) -> None:
    print(headline(measured))
    for curve in measured["curves"]:
        print(f"\n{curve['name']}")
        groups, theory = curve["groups"], curve["theory"]
        names = "".join(f"{name:>9}" for name in groups)
        print("layer  overlap    error   across   excess" + names + ("   theory" if theory else ""))
        for layer, value in enumerate(curve["overlap"]):
            across = curve["across"][layer]
            row = [value, curve["overlap_error"][layer], across, value - across]
            row += [group[layer] for group in groups.values()] + ([theory[layer]] if theory else [])
            print(f"{layer:>5}" + "".join(f"{number:>9.3f}" for number in row))
        if not theory and curve["measured_only"]:
            print(f"measured only, no theory: {curve['measured_only']}")
        if (verdict := _verdict(curve)) is not None:
            print(verdict)
    if not measured.get("toy"):
        print(f"\n{MEANING}")


def _verdict(curve: dict[str, Any]) -> str | None:
    """Whether the context does anything at the top; None where nothing says how far numbers move."""
    if curve["band"] is None:
        return None
    excess, band = curve["overlap"][-1] - curve["across"][-1], curve["band"]
    said = "none found" if abs(excess) <= band else f"{excess:.3f}"
    return f"excess at the top: {said}, band {band:.3f} (2 standard errors over {curve['draws']} draws)"
