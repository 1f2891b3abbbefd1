"""kmixer lab ecology: which sources of text differ beyond noise, and what a model tells apart of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from kmixer.analysis.figure_files import check_figure
from kmixer.cli.lab_options import check_runs, deliver, tell
from kmixer.cli.lab_rescue import check_rescue, rescue
from kmixer.cli.options import DataDir, FigureFile, Json
from kmixer.errors import InputError
from kmixer.runs.lab_ecology import EcologyRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Lines of a table of cuts.
SHOWN_CUTS = 15
MEANING = """\
Of halves of the texts, whose null is two halves of one; corrected: what is left without it. With all sources as often,
a predictor that cannot tell two apart loses at least the excess, corrected too. Nothing here says what training does,
or that a model merges sources as their texts do; without --model no model has been measured."""
OF_MODEL = """\
separated: above 95 % of the splits of one source; merged: the data separate the pair, and the model's number with 2
standard errors lies within these splits; unclear: neither."""


def ecology(
    sources: Annotated[
        list[str] | None, typer.Argument(metavar="A.txt B.txt ...", help="Texts: files, folders, names of corpora.")
    ] = None,
    context: Annotated[
        str | None, typer.Option(metavar="suffix:2|length:3,5,8|none", help="What is known before the next token.")
    ] = None,
    min_count: Annotated[
        int | None, typer.Option(min=1, help="How often every source has a context that counts; default: 30.")
    ] = None,
    blocks: Annotated[
        int | None, typer.Option(min=4, help="Blocks of a text that splits keep whole; default: 200.")
    ] = None,
    letters: Annotated[bool, typer.Option("--letters", help="Small letters and blanks alone.")] = False,
    model: Annotated[
        Path | None, typer.Option(metavar="RUN", help="What this model, a run or a folder, tells apart.")
    ] = None,
    window: Annotated[int | None, typer.Option(min=2, help="Of --model: tokens it reads; default: 64.")] = None,
    adapt: Annotated[Literal["on", "off"], typer.Option(help="Of --model: off freezes fast weights.")] = "on",
    as_rescue: Annotated[
        bool, typer.Option("--rescue", help="Train on texts of which a share has brackets, in the place of sources.")
    ] = False,
    mixers: Annotated[str | None, typer.Option(help="Of --rescue; default: softmax,k2.")] = None,
    alpha: Annotated[str | None, typer.Option(help="Of --rescue: shares; default: 0,.1,.25,.5,1.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Of --rescue; default: 3.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Of --rescue; default: 500.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the splits.")] = 0,
    save: Annotated[
        bool, typer.Option("--save", help="Of --model: keep it in the run's folder, where kmixer report draws it.")
    ] = False,
    figure: FigureFile = None,
    as_json: Json = False,
    data_dir: DataDir = None,
) -> None:
    """Measure how far sources of text differ beyond noise, which a predictor must keep apart, and what a model does.

    Example: kmixer lab ecology python-docs mine.txt yours.txt --figure ecology.svg
    """
    from kmixer.analysis.ecology import Asked, ecology_of_texts

    check_figure(figure)
    of_model = {"--window": window, "--adapt off": adapt == "off", "--save": save}
    of_texts = {"--context": context, "--min-count": min_count, "--blocks": blocks, "--letters": letters}
    of_rescue = {"--mixers": mixers, "--alpha": alpha, "--seeds": seeds, "--steps": steps}
    if as_rescue:
        check_rescue({"sources": sources, "--model": model, "--seed": seed, **of_texts, **of_model})
        rescue(mixers, alpha, seeds, steps, figure, as_json=as_json)
        return
    _refuse(of_rescue, "--rescue")
    if model is None:
        _refuse(of_model, "--model")
    elif save:
        check_runs([str(model)], {}, save=save)
    asked = Asked(
        context or Asked.context,
        min_count or Asked.min_count,
        blocks or Asked.blocks,
        letters=letters,
        window=window or Asked.window,
        adapt=adapt == "on",
        seed=seed,
    )
    measured = ecology_of_texts(sources or [], asked, model, data_dir, tell)
    save_in = model if save else None
    deliver(measured, EcologyRecord, _draw, _print, figure=figure, save_in=save_in, as_json=as_json)


def _refuse(options: Mapping[str, object], other: str) -> None:
    """Raises InputError, by name, for any of these options that was given without the other one."""
    if given := [name for name, value in options.items() if value]:
        raise InputError(f"{', '.join(given)}: only with {other}; add {other}, or leave it out")


def _draw(record: EcologyRecord) -> Figure:
    from kmixer.analysis.panels.ecology import draw_ecology
    from kmixer.analysis.panels.lab import labelled

    return draw_ecology(labelled(record))


def _print(measured: dict[str, Any]) -> None:
    names, unit = measured["sources"], measured["unit"]
    low, high = min(measured["coverage"]), max(measured["coverage"])
    letters = ", letters and blanks alone" if measured["letters"] else ""
    print(f"{len(names)} sources of {measured['tokens']:,} {unit}{letters}; context {measured['context']}")
    print(
        f"{measured['contexts']:,} contexts that each has {measured['min_count']} times or more, {low:.1%} to "
        f"{high:.1%} of the text; {measured['followers']:,} kinds of {unit} follow"
    )
    print(f"nats per token, {measured['splits']} splits into halves of {measured['blocks']} blocks\n")
    width = max(len(_pair(names, 0, 1)), *(len(_pair(names, row["first"], row["second"])) for row in measured["pairs"]))
    print(f"{'two halves of one source':<{width}}  JS, mean  largest    beta*, largest")
    for name, null in zip(names, measured["null"], strict=True):
        print(f"{name:<{width}}   {null['mean']:.5f}  {null['largest']:.5f}           {null['largest_beta']:.5f}")
    print(f"\n{'pair':<{width}}       JS  corrected    error   excess    beta*  corrected")
    for row in measured["pairs"]:
        line = f"{_pair(names, row['first'], row['second']):<{width}}  {row['js']:.5f}"
        if row["differs"]:
            line += f"    {row['corrected']:.5f}  {row['error']:.5f}  {row['gain']:.5f}  {row['beta']:.5f}"
            print(f"{line}    {row['beta_corrected']:.5f}")
        else:
            print(f"{line} none found (largest null {row['largest_null']:.5f})")
    how = "all partitions compared" if measured["exact"] else "greedy: single merges, too many sources for all"
    print(f"\nbest cells by beta ({how}), in brackets corrected")
    for step in measured["path"]:
        corrected = "none found" if step["noise"] else f"{step['beta_corrected']:.5f}"
        print(f"from {step['beta']:.5f} ({corrected})  excess {step['excess']:.5f}  {_cells(names, step['cells'])}")
    if len(measured["cuts"]) <= SHOWN_CUTS:
        print("\nexcess of every cut, corrected, error")
        for cut in (cut for cut in measured["cuts"] if len(cut["cells"]) < len(names)):
            value = f"{cut['corrected']:.5f}  {cut['error']:.5f}" if cut["differs"] else "none found      "
            print(f"{cut['excess']:.5f}  {value}  {_cells(names, cut['cells'])}")
    print(f"\n{MEANING}")
    if measured.get("model"):
        _print_model(measured["name"], names, measured["model"], measured["pairs"])


def _print_model(name: str, names: list[str], model: dict[str, Any], of_data: list[dict[str, Any]]) -> None:
    print(
        f"\n{name}: {model['laws']:,} laws of a source or more, windows of {model['window']}, "
        f"{model['splits']} splits; on {model['coverage']:.1%} of the contexts"
    )
    width = max(len(_pair(names, row["first"], row["second"])) for row in model["pairs"])
    print(f"{'pair':<{width}}  JS, data  JS, model    error    limit")
    for row, data in zip(model["pairs"], of_data, strict=True):
        print(
            f"{_pair(names, row['first'], row['second']):<{width}}   {data['js']:.5f}    {row['js']:.5f}  "
            f"{row['error']:.5f}  {row['limit']:.5f}  {row['says']}"
        )
    print(OF_MODEL)


def _pair(names: list[str], first: int, second: int) -> str:
    return f"{names[first]}, {names[second]}"


def _cells(names: list[str], cells: list[list[int]]) -> str:
    return " | ".join(" + ".join(names[state] for state in cell) for cell in cells)
