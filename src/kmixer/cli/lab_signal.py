"""kmixer lab signal: how gradients grow on their way down a model's layers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kmixer.analysis.figure_files import check_figure
from kmixer.cli.lab_options import (
    TARGET_HELP,
    MovedCorpus,
    Save,
    check_recipe,
    check_runs,
    deliver,
    headline,
    is_recipe,
    numbers,
    tell,
)
from kmixer.cli.options import DataDir, FigureFile, Json, Settings
from kmixer.errors import InputError, shown
from kmixer.measure.mean_field import LARGEST_ALPHA
from kmixer.runs.lab import SignalRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WITHOUT_DATA = "; --inputs symmetric needs no data"
# What J is, and what it is not.
MEANING = """\
J(L, l) is the mean squared singular value of the map from layer l to the top: above 1, gradients grow on their way
down. It is one number: a value near 1 does not say that all singular values are, and it says nothing about training."""
OF_SUMS = """\
A mixer here adds up what it has read without dividing by how much that is: J grows with the length of the sequence,
and belongs to this one. That is no defect: gradients are clipped, and Adam or Muon rescales them. Faster decays, a
lower cap of alpha and a higher rank lower it."""


def signal(
    target: Annotated[
        str,
        typer.Argument(metavar="RUN|RECIPE", help=TARGET_HELP),
    ],
    depths: Annotated[
        str | None, typer.Option(metavar="6,12,24", help="Of a recipe: layers; default: as many as it has.")
    ] = None,
    inits: Annotated[int | None, typer.Option(min=1, help="Of a recipe: initialisations; default: 8.")] = None,
    inputs: Annotated[
        str, typer.Option(metavar="N|symmetric", help="Validation inputs, or made ones, which need no data.")
    ] = "4",
    probes: Annotated[int, typer.Option(min=1, help="Backward passes for each initialisation.")] = 2,
    window: Annotated[
        int | None, typer.Option(min=1, help="Positions of a sequence; default: 64, or fewer where there are fewer.")
    ] = None,
    norm: Annotated[str | None, typer.Option(metavar="rms,dyt,derf", help="Of a recipe: kinds of norm.")] = None,
    alpha: Annotated[str | None, typer.Option(metavar="0.3,0.5", help="Of a recipe: alphas of dyt and derf.")] = None,
    read_out: Annotated[bool, typer.Option("--read-out", help="Count the read-out of a K-Stack too.")] = False,
    settings: Settings = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the first initialisation, and of the probes.")] = 0,
    save: Save = False,
    figure: FigureFile = None,
    corpus: MovedCorpus = None,
    as_json: Json = False,
    data_dir: DataDir = None,
) -> None:
    """Measure how gradients grow on their way down a model's layers, beside mean-field theory where that applies.

    Example: kmixer lab signal transformer-plays --depths 6,12,24 --figure signal.svg
    """
    from kmixer.analysis.lab_inputs import Asked
    from kmixer.analysis.signal import signal_of_recipe, signal_of_run

    check_figure(figure)
    asked = Asked(inits or 8, _number_of_inputs(inputs), probes, window, read_out, seed, WITHOUT_DATA)
    if is_recipe(target):
        check_recipe(save=save, corpus=corpus)
        norms = [kind.strip() for kind in norm.split(",")] if norm else []
        asked_of_recipe = (numbers("--depths", depths, int), norms, numbers("--alpha", alpha, float))
        measured = signal_of_recipe(target, settings or [], *asked_of_recipe, asked, data_dir, tell)
    else:
        of_recipe = {"--depths": depths, "--inits": inits, "--norm": norm, "--alpha": alpha, "--set": settings}
        check_runs([target], of_recipe, save=save)
        measured = signal_of_run(Path(target), asked, corpus, data_dir)
    save_in = Path(target) if save else None
    deliver(measured, SignalRecord, _draw, _print, figure=figure, save_in=save_in, as_json=as_json)


def _draw(record: SignalRecord) -> Figure:
    from kmixer.analysis.panels.lab import labelled
    from kmixer.analysis.panels.signal import draw_signal

    return draw_signal(labelled(record))


def _number_of_inputs(text: str) -> int | None:
    if text == "symmetric":
        return None
    if text.isascii() and text.isdigit() and 0 < int(text) <= 1 << 16:
        return int(text)
    raise InputError(f"--inputs: got {shown(text)}; allowed: a number from 1 on, or symmetric")


def _print(measured: dict[str, Any]) -> None:
    print(headline(measured))
    for curve in measured["curves"]:
        _print_curve(curve)
    print(MEANING)
    if any(curve["sums_over_positions"] for curve in measured["curves"]):
        print(OF_SUMS)


def _print_curve(curve: dict[str, Any]) -> None:
    """A line per layer, and what they say together."""
    theory = curve["log_theory"]
    print(f"\n{curve['name']}")
    print("layer         q   cosine      J(L, l)    error   J(l, l-1)" + ("      theory   ratio" if theory else ""))
    for layer, log in enumerate(curve["log_growth"]):
        block = f"{_shown(math.exp(curve['log_by_block'][layer - 1])):>12}" if layer else " " * 12
        line = (
            f"{layer:>5}  {curve['q'][layer]:8.2e}  {curve['cosine'][layer]:7.3f}  {_shown(math.exp(log)):>11}"
            f"  {math.expm1(curve['log_growth_error'][layer]):7.1%}{block}"
        )
        if theory:
            line += f"  {_shown(math.exp(theory[layer])):>10}  {math.exp(log - theory[layer]):6.3f}"
        print(line)
    low, high = map(_shown, curve["total_interval"])
    error = f"{low} to {high}: 2 standard errors over {curve['draws']} {curve['drawn']}"
    print(
        f"J(L, 0) = {_shown(curve['total'])} ({error if curve['draws'] > 1 else 'one draw, without an error'}), "
        f"of which the first block makes {_shown(curve['first_block'])}; {_law(curve['law'])}"
    )
    if theory:
        print(f"theory: measured and predicted J differ by a factor of {curve['agreement']:.3f} in the mean")
        if (alpha := curve["advised_alpha"]) is not None:
            more = ", the largest that was tried," if alpha == LARGEST_ALPHA else ""
            print(f"theory: up to alpha {alpha:g}{more} gradients grow no more than with RMSNorm")
    else:
        print(f"measured only, no theory: {curve['measured_only']}")
    if curve.get("warning"):
        print(f"warning: {curve['warning']}")
    print()


def _law(law: dict[str, Any]) -> str:
    return {
        "power": f"grows like a power of depth (exponent {law['exponent']:.2f})",
        "stretched": f"grows like a stretched exponential (rate {law['rate']:.2f})",
        "neither": "by neither law alone",
        "flat": "hardly any growth",
        "shallow": "too shallow to say by which law",
    }[law["law"]]


def _shown(value: float) -> str:
    return f"{value:.3g}" if value >= 1000 else f"{value:.2f}"
