"""kmixer train, eval, generate, convert, pack, unpack: what is done with one run.

Training is imported by its command alone: accelerate takes as long to import as torch.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from kmixer.cli.options import Cpu, DataDir, Json, RecipeName, Run, RunOrPackaged, Settings
from kmixer.data.token_files import prepare_dataset
from kmixer.errors import InputError
from kmixer.generation.sampling import Sampling
from kmixer.generation.streaming import generate_text
from kmixer.interop.koneko import convert as convert_checkpoint
from kmixer.language_model import load
from kmixer.measure.evaluation import evaluate as measure
from kmixer.runs.archive import pack as pack_run
from kmixer.runs.archive import unpack as unpack_run
from kmixer.runs.recipe import ClassificationRecipe, as_language, load_language_recipe, load_recipe
from kmixer.runs.run_folder import UNKNOWN, RunFolder


def train(
    recipe: RecipeName,
    settings: Settings = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; default runs/RECIPE-seedN.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run that is in the run folder.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the run that is in the run folder.")] = False,
    seed: Annotated[int | None, typer.Option(help="Short for --set training.seed=N.")] = None,
    begin_from: Annotated[
        Path | None,
        typer.Option(
            "--from", help="Begin with the weights and the tokenizer of this run, model folder or packaged model."
        ),
    ] = None,
    corpus: Annotated[
        str | None, typer.Option(help="The file or folder of the data, where it is not where the recipe says.")
    ] = None,
    data_dir: DataDir = None,
    cpu: Cpu = False,
) -> None:
    """Train a recipe into a run folder. Ctrl-C saves and stops; --resume continues exactly.

    Example: kmixer train shakespeare-quick
    """
    from kmixer.cli.progress import TerminalReporter
    from kmixer.training.loop import train as run_training
    from kmixer.training.process import settle_process

    settle_process()
    if resume and force:
        raise InputError("--resume continues a run and --force replaces it; give one of them")
    settings = list(settings or []) + ([f"training.seed={seed}"] if seed is not None else [])
    loaded = load_recipe(recipe, settings)
    out = out or Path("runs") / f"{loaded.name}-seed{loaded.training.seed}"
    with TerminalReporter() as reporter:
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


def evaluate(
    run: Run,
    protocol: Annotated[
        Literal["windows", "stream"], typer.Option(help="Windows with the state reset, or one stream.")
    ] = "windows",
    window: Annotated[int | None, typer.Option(help="Tokens a window; default: the recipe's.")] = None,
    as_json: Json = False,
    data_dir: DataDir = None,
) -> None:
    """Measure a run's loss on the validation part of its data, in float32; the accuracy too, of a classifier.

    Example: kmixer eval runs/shakespeare-quick-seed42 --protocol stream
    """
    if window is not None and window < 1:
        raise InputError(f"--window: got {window}; allowed: 1 or more")
    if window is not None and protocol == "stream":
        raise InputError("--window goes with --protocol windows; a stream has none")
    recipe = RunFolder(run).read_recipe()
    if isinstance(recipe, ClassificationRecipe):
        _evaluate_classifier(run, recipe, as_json, data_dir)
        return
    recipe = as_language(recipe)
    model = load(run)
    assert model.tokenizer is not None
    dataset = prepare_dataset(recipe.data, model.tokenizer, data_dir)
    if model.about.get("corpus_sha256") not in (dataset.sha256, UNKNOWN):
        raise InputError(f"the text of corpus {recipe.data.corpus} is not what {run} was trained on")
    result = measure(model, dataset.validation, protocol, window or recipe.evaluation_window)
    if as_json:
        print(json.dumps(result.to_json()))
        return
    where = f"windows of {result.window}, state reset" if result.window else "one stream, state carried"
    print(f"{recipe.data.corpus}, validation part, {result.tokens:,} tokens, {where}")
    print(f"cross-entropy       {result.loss:.4f} nats a token")
    if result.perplexity is not None:
        print(f"perplexity          {result.perplexity:.4f} a token ({recipe.tokenizer.kind})")
    print(f"bits per character  {result.bits_per_character:.4f}")
    print(f"bits per byte       {result.bits_per_byte:.4f}")
    if result.perplexity_per_word is not None:
        print(f"perplexity a word   {result.perplexity_per_word:,.1f}")


def _evaluate_classifier(run: Path, recipe: ClassificationRecipe, as_json: bool, data_dir: Path | None) -> None:
    from kmixer.training.tasks import open_classifier

    task, model = open_classifier(run, data_dir)
    (result,) = task.evaluate(model)
    if as_json:
        print(json.dumps(result.to_json()))
        return
    print(f"{recipe.dataset}, validation part, {result.examples:,} examples")
    print(f"cross-entropy       {result.loss:.4f} nats")
    print(f"accuracy            {result.accuracy:.4f}")


def generate(
    run: RunOrPackaged,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add.")] = 400,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest tokens of total probability p.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes the text repeatable.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text to stop before; may be given again.")] = None,
) -> None:
    """Continue a text with a run's model, printed as it is written.

    Example: kmixer generate runs/shakespeare-quick-seed42 --prompt "**HAMLET**"
    """
    model = load(run)
    assert model.tokenizer is not None
    sampling = Sampling(temperature, top_k, top_p)
    pieces = generate_text(model, model.tokenizer, prompt, max_new_tokens, sampling, seed=seed, stop=stop or ())
    first = next(pieces, "")  # wrong input shows before anything is printed
    for piece in itertools.chain([prompt, first], pieces):
        print(piece, end="", flush=True)
    print()


def convert(
    file: Annotated[Path, typer.Argument(help="A checkpoint of the K-Operators author (.pt).")],
    recipe: Annotated[str, typer.Option(help="The recipe that describes it.")],
    out: Annotated[Path, typer.Option(help="Run folder to make.")],
    settings: Settings = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the run that is in the run folder.")] = False,
    data_dir: DataDir = None,
) -> None:
    """Turn one of the author's later checkpoints (short base kernel, copy branch off) into a run folder.

    Example: kmixer convert char.pt --recipe k-operators-local-shakespeare --out runs/author
    """
    for line in convert_checkpoint(file, load_language_recipe(recipe, settings), out, force=force, data_dir=data_dir):
        print(line)


def pack(
    run: Run,
    out: Annotated[Path, typer.Option(help="Archive to make, .tar.gz.")],
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Put a run into one archive, to send or to keep.

    Example: kmixer pack runs/shakespeare-quick-seed42 --out quick.tar.gz
    """
    pack_run(run, out, force=force)
    print(out)


def unpack(
    archive: Annotated[Path, typer.Argument(help="An archive that kmixer pack made.")],
    out: Annotated[Path, typer.Option(help="Run folder to make.")],
) -> None:
    """Unpack a run archive; anything but a run's own files is refused.

    Example: kmixer unpack quick.tar.gz --out runs/quick
    """
    unpack_run(archive, out)
    print(out)
