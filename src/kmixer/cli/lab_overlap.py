"""kmixer lab overlap: how alike the tokens of a sequence become with depth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from kmixer.analysis.lab_inputs import Asked
from kmixer.analysis.overlap import overlap_of_recipe, overlap_of_run, overlap_of_toy
from kmixer.cli.lab_options import check_figure, is_recipe, numbers, save_figure, tell
from kmixer.cli.options import DataDir, Json, Settings
from kmixer.errors import InputError
from kmixer.runs.lab import OverlapRecord, save_measurement
from kmixer.runs.run_folder import RunFolder

MEANING = """\
overlap: mean cosine between different tokens of a sequence; across: between tokens of different sequences, which is
what is common to all text; excess: their difference, which is what the context does. That a model mixes much or little
says nothing about its loss."""


def overlap(
    target: Annotated[
        str | None,
        typer.Argument(metavar="RUN|RECIPE", help="A run or model folder, as it was trained; a recipe, as it begins."),
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
    save: Annotated[
        bool, typer.Option("--save", help="Of a run: keep it in the run's folder, where kmixer report draws it.")
    ] = False,
    figure: Annotated[Path | None, typer.Option(help="Draw it into this .svg or .png file.")] = None,
    corpus: Annotated[str | None, typer.Option(help="Where a run's own data is now, if it was moved.")] = None,
    as_json: Json = False,
    data_dir: DataDir = None,
) -> None:
    """Measure how alike tokens become with depth, beside mean-field theory where that applies.

    Example: kmixer lab overlap transformer-plays --mixers softmax,gaussian,k2 --figure overlap.svg
    """
    check_figure(figure)
    asked = Asked(inits, windows, 0, window, False, seed)
    if toy != (target is None):
        raise InputError("overlap: give a run or a recipe, or --toy alone")
    if toy:
        measured = overlap_of_toy(seed)
    elif is_recipe(str(target)):
        if save or corpus is not None:
            raise InputError("--save and --corpus go with a run; a recipe has no folder, and its data is data.corpus")
        kinds = [kind.strip() for kind in mixers.split(",")] if mixers else []
        measured = overlap_of_recipe(
            str(target), settings or [], numbers("--depth", depth, int), kinds, asked, data_dir
        )
    else:
        if depth is not None or mixers is not None or settings:
            raise InputError("--depth, --mixers and --set go with a recipe; a run is measured as it is")
        measured = overlap_of_run(Path(str(target)), asked, corpus, data_dir)
    if figure is not None:
        from kmixer.analysis.panels.overlap import draw_overlap

        save_figure(lambda: draw_overlap(OverlapRecord.parse(measured, source=str(figure))), figure)
    if save:
        run = RunFolder(Path(str(target)))
        if not run.exists():
            raise InputError(f"--save: {target} is a model without its run, and keeps no measurements")
        tell(f"saved: {save_measurement(run, OverlapRecord.panel, measured)}")
    if as_json:
        print(json.dumps(measured))
    else:
        _print(measured)


def _print(measured: dict[str, Any]) -> None:
    state = "best weights" if measured["trained"] else "at initialisation"
    print(f"{measured['name']}, {state}, sequences of {measured['positions']} positions")
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
