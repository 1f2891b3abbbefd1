"""kmixer lab overlap: how alike the tokens of a sequence become with depth."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kmixer.analysis.figure_files import check_figure
from kmixer.cli.lab_options import (
    MovedCorpus,
    Save,
    check_recipe,
    check_runs,
    deliver,
    headline,
    is_recipe,
    numbers,
)
from kmixer.cli.options import DataDir, FigureFile, Json, Settings
from kmixer.errors import InputError, shown
from kmixer.runs.lab import OverlapRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEANING = """\
overlap: mean cosine between different tokens of a sequence; across: between tokens of different sequences, which is
what is common to all text; excess: their difference, which is what the context does; fresh: initialisations of a run's
recipe on the same inputs. That a model mixes much or little says nothing about its loss."""


def overlap(
    targets: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN [RUN2 ...]|RECIPE", help="Run folders, as they were trained; a recipe, as it begins."
        ),
    ] = None,
    depth: Annotated[
        str | None, typer.Option(metavar="6,24", help="Of a recipe: layers; default: as many as it has.")
    ] = None,
    mixers: Annotated[
        str | None, typer.Option(metavar="softmax,k2", help="Of a transformer's recipe: a curve for each.")
    ] = None,
    inits: Annotated[int, typer.Option(min=1, help="Initialisations: of a recipe, or beside every run.")] = 8,
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
    from kmixer.analysis.overlap import overlap_of_recipe, overlap_of_runs, overlap_of_toy

    check_figure(figure)
    asked = Asked(inits, windows, window=window, seed=seed)
    if toy == bool(targets):
        raise InputError("overlap: give runs or a recipe, or --toy alone")
    recipes = [target for target in targets or [] if is_recipe(target)]
    if not targets:
        measured = overlap_of_toy(seed)
    elif recipes:
        if len(targets) > 1:
            raise InputError(
                f"overlap: got {len(targets)} names; {shown(recipes[0])} is no run, and a recipe goes alone"
            )
        check_recipe(save=save, corpus=corpus)
        kinds = [kind.strip() for kind in mixers.split(",")] if mixers else []
        measured = overlap_of_recipe(recipes[0], settings or [], numbers("--depth", depth, int), kinds, asked, data_dir)
    else:
        check_runs(targets, {"--depth": depth, "--mixers": mixers, "--set": settings}, save=save)
        measured = overlap_of_runs([Path(target) for target in targets], asked, corpus, data_dir)
    save_in = Path(targets[0]) if save and targets else None
    deliver(measured, OverlapRecord, _draw, _print, figure=figure, save_in=save_in, as_json=as_json)


def _draw(record: OverlapRecord) -> Figure:
    from kmixer.analysis.panels.lab import labelled
    from kmixer.analysis.panels.overlap import draw_overlap

    return draw_overlap(labelled(record))


def _print(measured: dict[str, Any]) -> None:
    print(headline(measured))
    for curve in measured["curves"]:
        print(f"\n{curve['name']}")
        columns = _columns(curve)
        print("layer" + "".join(f"{name:>9}" for name in columns))
        for layer, row in enumerate(zip(*columns.values(), strict=True)):
            print(f"{layer:>5}" + "".join(f"{number:>9.3f}" for number in row))
        if not curve["theory"] and curve["measured_only"]:
            print(f"measured only, no theory: {curve['measured_only']}")
        if (verdict := _verdict(curve)) is not None:
            print(verdict)
    if not measured.get("toy"):
        print(f"\n{MEANING}")


def _columns(curve: dict[str, Any]) -> dict[str, list[float]]:
    """By layer; the last are of fresh weights where these are a run's."""
    columns = {"overlap": curve["overlap"], "error": curve["overlap_error"], "across": curve["across"]}
    columns |= {"excess": _excess(curve), **curve["groups"]}
    if curve["theory"]:
        columns["theory"] = curve["theory"]
    if fresh := curve.get("fresh"):
        columns |= {"fresh": fresh["overlap"], "(excess)": _excess(fresh)}
    return columns


def _excess(curve: dict[str, Any]) -> list[float]:
    return [overlap - across for overlap, across in zip(curve["overlap"], curve["across"], strict=True)]


def _verdict(curve: dict[str, Any]) -> str | None:
    """Whether the context does anything at the top; None where nothing says how far numbers move."""
    if curve["band"] is None:
        return None
    excess, band = _excess(curve)[-1], curve["band"]
    said = "none found" if abs(excess) <= band else f"{excess:.3f}"
    of_fresh = f"; of fresh weights {_excess(curve['fresh'])[-1]:.3f}" if "fresh" in curve else ""
    return f"excess at the top: {said}, band {band:.3f} (2 standard errors over {curve['draws']} draws){of_fresh}"
