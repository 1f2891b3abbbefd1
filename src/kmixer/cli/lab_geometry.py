"""kmixer lab geometry: how far perturbed inputs move representations, of runs, and by the head that was trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from kmixer.analysis.figure_files import check_figure
from kmixer.cli.geometry_tables import print_heads, print_runs
from kmixer.cli.lab_options import MovedCorpus, Save, check_runs, deliver, numbers, tell
from kmixer.cli.options import DataDir, FigureFile, Json
from kmixer.errors import InputError, check_choice
from kmixer.models.mixers.registry import CAUSAL_NAMES
from kmixer.runs.lab_geometry import AblationRecord, GeometryRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Pooling = Literal["mean", "last"]
# Of the ablation, where nothing else is asked for.
SYSTEMS, MIXERS, HEADS, CODEBOOK = "oscillator,lorenz,sines", "softmax,k2", "ce,mse", "64"
SEEDS = 3
LEAST_CODES, MOST_CODES = 2, 4096


def geometry(
    runs: Annotated[
        list[str] | None, typer.Argument(metavar="RUN [RUN2]", help="One or two run folders of language models.")
    ] = None,
    ablation: Annotated[
        bool, typer.Option("--ablation", help="Train small encoders of series with two heads instead of a run.")
    ] = False,
    systems: Annotated[str | None, typer.Option(metavar=SYSTEMS, help="Of the ablation: series; default: all.")] = None,
    mixers: Annotated[
        str | None, typer.Option(metavar=MIXERS, help=f"Of the ablation: encoders; default: {MIXERS}.")
    ] = None,
    heads: Annotated[
        str | None,
        typer.Option(metavar=HEADS, help="Of the ablation: what is predicted, token or value; default: both."),
    ] = None,
    codebook: Annotated[
        str | None,
        typer.Option(metavar="8,32,128,512", help=f"Of the ablation: numbers of codes; default: {CODEBOOK}."),
    ] = None,
    learned: Annotated[
        bool, typer.Option("--learned", help="Of the ablation: codes by k-means in the place of equal bins.")
    ] = False,
    seeds: Annotated[
        int | None, typer.Option(min=1, help=f"Of the ablation: seeds of every arm; default: {SEEDS}.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=0, help="Of the ablation: of training; default: 300.")] = None,
    length: Annotated[
        int | None, typer.Option(min=16, help="Of the ablation: positions of a series; default: 64.")
    ] = None,
    width: Annotated[int | None, typer.Option(min=8, help="Of the ablation: of the encoders; default: 32.")] = None,
    noise: Annotated[
        str, typer.Option(metavar="0.01,0.05,0.1", help="Shares of the positions that are perturbed.")
    ] = "0.01,0.05,0.1",
    reverse: Annotated[bool, typer.Option("--reverse", help="Of a run: windows read backwards too.")] = False,
    pool: Annotated[str, typer.Option(metavar="mean|last", help="How positions become one vector.")] = "mean",
    layer: Annotated[
        int | None, typer.Option(min=0, help="Of a run: the stream after so many blocks; default: what the head reads.")
    ] = None,
    windows: Annotated[
        int | None, typer.Option(min=4, help="Of a run: default: 20 for every channel, as far as the text goes.")
    ] = None,
    window: Annotated[int | None, typer.Option(min=2, help="Of a run: positions of a window; default: 64.")] = None,
    inits: Annotated[
        int | None, typer.Option(min=1, help="Of a run: untrained encoders beside it; default: 2.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the first initialisation, and of what is replaced.")] = 0,
    save: Save = False,
    figure: FigureFile = None,
    corpus: MovedCorpus = None,
    as_json: Json = False,
    data_dir: DataDir = None,
) -> None:
    """Measure how far perturbed inputs move representations, beside what unrelated inputs and untrained encoders give.

    Example: kmixer lab geometry --ablation --systems lorenz --figure geometry.svg
    """
    check_figure(figure)
    rates = tuple(numbers("--noise", noise, float))
    if max(rates) > 1:
        raise InputError(f"--noise: got {noise}; allowed: shares of the positions, above 0 and up to 1")
    check_choice("--pool", pool, ("mean", "last"))
    pooling: Pooling = "last" if pool == "last" else "mean"
    of_ablation = {
        "--systems": systems,
        "--mixers": mixers,
        "--heads": heads,
        "--codebook": codebook,
        "--learned": learned or None,
        "--seeds": seeds,
        "--steps": steps,
        "--length": length,
        "--width": width,
    }
    of_run = {
        "--reverse": reverse or None,
        "--layer": layer,
        "--windows": windows,
        "--window": window,
        "--inits": inits,
        "--save": save or None,
        "--corpus": corpus,
    }
    if ablation == bool(runs) or len(runs or []) > 2:
        raise InputError("geometry: give one run or two, or --ablation alone")
    _refuse(of_run if ablation else of_ablation, "a run; --ablation has none" if ablation else "--ablation")
    if ablation:
        measured = _ablation(of_ablation, rates, pooling, seed)
        deliver(measured, AblationRecord, _draw_heads, print_heads, figure=figure, save_in=None, as_json=as_json)
        return
    assert runs is not None
    targets = [Path(run) for run in runs]
    check_runs(runs, {}, save=save)
    from kmixer.analysis.geometry import Perturbing, geometry_of_runs

    asked = Perturbing(
        rates,
        reverse,
        pooling,
        layer,
        windows,
        window or Perturbing.window,
        inits or Perturbing.initialisations,
        seed,
    )
    measured = geometry_of_runs(targets, asked, corpus, data_dir, tell)
    save_in = targets[0] if save else None
    deliver(measured, GeometryRecord, _draw_runs, print_runs, figure=figure, save_in=save_in, as_json=as_json)


def _refuse(options: dict[str, Any], goes_with: str) -> None:
    """Raises InputError for an option that was given."""
    for name, value in options.items():
        if value is not None:
            raise InputError(f"{name} goes with {goes_with}; leave it out")


def _ablation(asked: dict[str, Any], rates: tuple[float, ...], pool: Pooling, seed: int) -> dict[str, Any]:
    from kmixer.analysis.geometry import geometry_of_heads
    from kmixer.data.systems import SYSTEMS as KNOWN_SYSTEMS
    from kmixer.experiments.geometry import HEADS as KNOWN_HEADS
    from kmixer.experiments.geometry import Arms, Setting

    codebooks = numbers("--codebook", asked["--codebook"] or CODEBOOK, int)
    if not all(LEAST_CODES <= codes <= MOST_CODES for codes in codebooks):
        raise InputError(f"--codebook: got {asked['--codebook']}; allowed: numbers from {LEAST_CODES} to {MOST_CODES}")
    arms = Arms(
        _names("--systems", asked["--systems"] or SYSTEMS, KNOWN_SYSTEMS),
        _names("--mixers", asked["--mixers"] or MIXERS, CAUSAL_NAMES),
        _names("--heads", asked["--heads"] or HEADS, KNOWN_HEADS),
        list(dict.fromkeys(codebooks)),
        [seed + index for index in range(asked["--seeds"] or SEEDS)],
    )
    setting = Setting(
        steps=Setting.steps if asked["--steps"] is None else asked["--steps"],
        length=asked["--length"] or Setting.length,
        width=asked["--width"] or Setting.width,
        learned=bool(asked["--learned"]),
        rates=rates,
        pool=pool,
    )
    return geometry_of_heads(arms, setting, tell)


def _names(option: str, text: str, allowed: Sequence[str] | dict[str, Any]) -> list[str]:
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        check_choice(option, name, allowed)
    return names


def _draw_runs(record: GeometryRecord) -> Figure:
    from kmixer.analysis.panels.geometry import draw_geometry
    from kmixer.analysis.panels.lab import labelled

    return draw_geometry(labelled(record))


def _draw_heads(record: AblationRecord) -> Figure:
    from kmixer.analysis.panels.geometry_heads import draw_heads

    return draw_heads(record)
