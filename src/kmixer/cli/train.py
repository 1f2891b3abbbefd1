"""kmixer train.

Training is imported by the command alone: accelerate takes as long to import as torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kmixer.cli.options import Cpu, DataDir, RecipeOrFrom, Settings, TrackOut
from kmixer.errors import InputError
from kmixer.runs.recipe import load_recipe
from kmixer.runs.run_folder import RunFolder


def train(
    recipe: RecipeOrFrom = None,
    settings: Settings = None,
    out: Annotated[
        Path | None, typer.Option(help="Run folder; default runs/RECIPE-seedN, or runs/RUN-continued of --from RUN.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run that is in the run folder.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the run that is in the run folder.")] = False,
    seed: Annotated[int | None, typer.Option(help="Short for --set training.seed=N.")] = None,
    begin_from: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="RUN",
            help="Begin with the weights and the tokenizer of this run, model folder or packaged model, and with the "
            "recipe of the run where none is named. What it does not have begins fresh.",
        ),
    ] = None,
    corpus: Annotated[
        str | None, typer.Option(help="The file or folder of the data, where it is not where the recipe says.")
    ] = None,
    data_dir: DataDir = None,
    cpu: Cpu = False,
    track: Annotated[
        str | None,
        typer.Option(
            envvar="KMIXER_TRACK",
            metavar="LIBRARY,...",
            help="Show the curves in tensorboard, trackio or wandb while it trains; see kmixer track.",
        ),
    ] = None,
    track_out: TrackOut = Path("tracking"),
) -> None:
    """Train a recipe into a run folder. Ctrl-C saves and stops; --resume continues exactly.

    Example: kmixer train shakespeare-quick

    To go on from a run: kmixer train --from runs/shakespeare-quick-seed42 --set training.steps=500
    """
    from kmixer.cli.progress import open_reporter
    from kmixer.training.loop import train as run_training
    from kmixer.training.origin import recipe_of_origin
    from kmixer.training.process import settle_process

    settle_process()
    if resume and force:
        raise InputError("--resume continues a run and --force replaces it; give one of them")
    settings = list(settings or []) + ([f"training.seed={seed}"] if seed is not None else [])
    if recipe is not None:
        loaded = load_recipe(recipe, settings)
        out = out or Path("runs") / f"{loaded.name}-seed{loaded.training.seed}"
    elif begin_from is not None:
        out = out or Path("runs") / f"{begin_from.resolve().name}-continued"
        loaded = RunFolder(out).changed_recipe(settings) if resume else recipe_of_origin(begin_from, settings)
    elif resume and out is not None:
        loaded = RunFolder(out).changed_recipe(settings)
    else:
        raise InputError("what to train: got neither RECIPE nor --from RUN; give one of them (see kmixer recipes)")
    with open_reporter(track, track_out, resume=resume) as reporter:
        result = run_training(
            loaded,
            out,
            resume=resume,
            force=force,
            begin_from=begin_from,
            corpus=corpus,
            data_dir=data_dir,
            cpu=cpu,
            reporter=reporter,
        )
    if not result.is_main_process:
        return
    if not result.saved:
        print(f"interrupted after step {result.step}, before its first evaluation: {result.run} keeps the run it held")
        raise typer.Exit(130)
    if not result.finished:
        print(f"interrupted after step {result.step}; saved. Continue with the same command and --resume")
        raise typer.Exit(130)
    print(
        f"done in {result.seconds:.0f} s. Lowest validation loss {result.best['loss']:.4f} nats, at step "
        f"{result.best['step']}; those weights were chosen by it and are in {result.run}"
    )
