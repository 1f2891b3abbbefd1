"""kmixer bench: speed and memory on this machine, beside the baselines and its measured roofs."""

from __future__ import annotations

import itertools
import sys
from dataclasses import asdict
from typing import Annotated, Any, Literal

import typer

from kmixer.analysis.figure_files import check_figure, write_figure
from kmixer.bench.copy import CopySizes, bench_copy
from kmixer.bench.length import LENGTHS, LengthSpeed, bench_length, draw_length
from kmixer.bench.measure import roofs, settle
from kmixer.bench.mixer import Shape, add_peaks, bench_mixer
from kmixer.bench.models import ModelName, Precision, bench_decode, bench_memory, bench_train
from kmixer.bench.op import bench_op, usable_backends
from kmixer.cli import bench_peers, bench_speculation
from kmixer.cli.bench_report import print_report
from kmixer.cli.options import DataDir, FigureFile, Json, RecipeName, Repeats, Settings, Threads
from kmixer.data.corpora import find_corpus
from kmixer.errors import InputError
from kmixer.models.mixers.registry import BASELINE, CARDS
from kmixer.runs.recipe import load_language_recipe

app = typer.Typer(help="Speed and memory on this machine's CPU, beside the baselines.", no_args_is_help=True)

RECIPES = ["k-operators-v2-shakespeare", "k-operators-local-shakespeare"]
SHAPES = [(32, 128, 256, 16), (4, 64, 2048, 2)]
MODELS: tuple[ModelName, ...] = ("recipe", "transformer")
COPY_SIZES = CopySizes()
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")

Recipes = Annotated[list[str] | None, typer.Option("--recipe", help="A recipe; may be given again.")]
Model = Annotated[Literal["both", "recipe", "transformer"], typer.Option(help="Which of the two models.")]


@app.command()
def op(threads: Threads = 1, repeats: Repeats = 7, as_json: Json = False) -> None:
    """Time decayed linear attention by backend.

    Example: kmixer bench op --threads 1
    """
    settle(threads)
    roof = roofs()
    flops = roof.matmul("float32")
    rows = [row.to_json() for shape in SHAPES for row in bench_op(*shape, usable_backends(*shape), repeats, flops)]
    columns = {
        "backend": "backend", "r": "r", "d": "d", "t": "t", "b": "b", "forward ms": "forward_seconds",
        "fwd+bwd ms": "training_seconds", "of bound": "part_of_fused_bound", "x mask": "times_faster_than_mask",
    }  # fmt: skip
    print_report("op", roof, rows, columns, as_json)


@app.command()
def train(
    recipe: Recipes = None, settings: Settings = None, threads: Threads = 1, repeats: Repeats = 5, as_json: Json = False
) -> None:
    """Time training steps of recipes and of transformers of equal size, in float32 and bfloat16.

    Example: kmixer bench train --recipe k-operators-local-shakespeare
    """
    settle(threads)
    recipes = [load_language_recipe(name, settings) for name in recipe or RECIPES]
    roof = roofs()
    rows = [
        asdict(bench_train(loaded, model, precision, repeats, roof.matmul(precision)))
        for loaded in recipes
        for model in MODELS
        for precision in PRECISIONS
    ]
    columns = {
        "recipe": "recipe", "model": "model", "precision": "precision", "parameters": "parameters",
        "tokens/s": "tokens_per_second", "of roof": "part_of_roof",
    }  # fmt: skip
    print_report("train", roof, rows, columns, as_json)


@app.command()
def decode(
    recipe: Recipes = None,
    settings: Settings = None,
    context: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 2048,
    tokens: Annotated[int, typer.Option(help="Tokens to decode.")] = 1000,
    model: Model = "both",
    batch: Annotated[list[int] | None, typer.Option(help="Sequences at once; may be given again.")] = None,
    threads: Threads = 1,
    as_json: Json = False,
) -> None:
    """Time decoding after a prompt at batch 1 and 64, and the time to the first token.

    Example: kmixer bench decode --recipe k-operators-local-shakespeare
    """
    settle(threads)
    rows = [
        asdict(bench_decode(load_language_recipe(name, settings), kind, batch_size, context, tokens))
        for name in recipe or ["k-operators-local-shakespeare"]
        for kind in (MODELS if model == "both" else (model,))
        for batch_size in batch or (1, 64)
    ]
    columns = {
        "recipe": "recipe", "model": "model", "batch": "batch_size", "context": "context",
        "first token ms": "seconds_to_first_token", "tokens/s": "tokens_per_second",
        "2nd/1st half": "second_half_over_first",
    }  # fmt: skip
    print_report("decode", roofs(), rows, columns, as_json)


@app.command()
def length(
    recipe: RecipeName = "k-operators-local-shakespeare",
    settings: Settings = None,
    tokens: Annotated[int, typer.Option(help="Tokens of a training step.")] = 65536,
    longest_step: Annotated[float, typer.Option(help="A series ends with a step of more seconds.")] = 20.0,
    longest: Annotated[int, typer.Option(help="The longest window, at most 65536.")] = 65536,
    figure: FigureFile = None,
    threads: Threads = 1,
    repeats: Repeats = 5,
    as_json: Json = False,
) -> None:
    """Time a trained token against the length of the window, beside mask, recurrent and a transformer.

    Example: kmixer bench length --figure length.svg
    """
    check_figure(figure)
    settle(threads)
    lengths = tuple(t for t in LENGTHS if t <= longest)
    if not lengths:
        raise InputError(f"--longest: got {longest}; allowed: {LENGTHS[0]} or more")
    rows: list[LengthSpeed] = []
    for row in bench_length(
        lambda more: load_language_recipe(recipe, [*(settings or []), *more]), tokens, longest_step, repeats, lengths
    ):
        rows.append(row)
        print(f"{row.series}, window {row.speed.window}: {row.speed.tokens_per_second:,.0f} tokens/s", file=sys.stderr)
    if figure is not None:
        write_figure(draw_length(rows), figure)
    columns = {"series": "series", "window": "window", "batch": "batch_size", "tokens/s": "tokens_per_second"}
    print_report("length", roofs(), [row.to_json() for row in rows], columns, as_json)


@app.command()
def memory(recipe: Recipes = None, settings: Settings = None, as_json: Json = False) -> None:
    """Measure the peak memory of training, of recipes and of transformers of equal size.

    Example: kmixer bench memory --recipe k-operators-local-shakespeare
    """
    rows = [asdict(bench_memory(name, settings or [], model)) for name in recipe or RECIPES for model in MODELS]
    print_report("memory", None, rows, {"recipe": "recipe", "model": "model", "peak MB": "peak_bytes"}, as_json)


@app.command()
def mixer(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(CARDS)}.")],
    t: Annotated[list[int] | None, typer.Option("--t", help="Positions; may be given again.")] = None,
    width: Annotated[list[int] | None, typer.Option(help="Width, all heads together; may be given again.")] = None,
    heads: Annotated[int, typer.Option(help="Heads, of mixers that have them.")] = 4,
    batch: Annotated[int, typer.Option(help="Sequences at once.")] = 2,
    window: Annotated[int | None, typer.Option(help="Time it with this window too.")] = None,
    peaks: Annotated[bool, typer.Option("--peaks", help="Measure the peak memory of its operator, too.")] = False,
    threads: Threads = 1,
    repeats: Repeats = 5,
    as_json: Json = False,
) -> None:
    """Time a mixer beside softmax attention of equal width: its operator by backend, its layer and a block.

    Example: kmixer bench mixer gaussian --t 1024 --t 4096 --window 256
    """
    settle(threads)
    rows: list[dict[str, Any]] = []
    windows = (None,) if window is None else (None, window)
    for d, positions in itertools.product(width or (256,), t or (1024,)):
        rows += bench_mixer(name, Shape(positions, d, heads, batch), windows, repeats)
    if peaks:
        add_peaks(name, rows, heads)
    columns = {
        "what": "what", "t": "t", "width": "width", "causal": "causal", "window": "window", "fwd+bwd ms": "seconds",
        f"of {BASELINE}": "relative", "x definition": "times_faster", "peak MB": "peak_bytes",
        "cache per token": "cache",
    }  # fmt: skip
    print_report("mixer", roofs(), rows, columns, as_json)


@app.command()
def copy(
    corpus: Annotated[str, typer.Option(help="The text: a corpus, a file or a folder.")] = "python-docs",
    data_dir: DataDir = None,
    threads: Threads = 1,
    repeats: Repeats = 5,
    as_json: Json = False,
) -> None:
    """Time the copy memory: its matches on text and on the inputs that are hardest for them, training, decoding.

    Example: kmixer bench copy --corpus plays
    """
    text = "".join(str(block) for block in find_corpus(corpus, data_dir).read())
    settle(threads)
    columns = {
        "section": "section", "what": "what", "rows": "rows", "t": "t", "vocabulary": "vocabulary", "ms": "seconds",
        "tokens/s": "tokens_per_second", "x text": "token_relative_to_text", "x without": "relative_to_without",
    }  # fmt: skip
    rows = bench_copy(text, COPY_SIZES, repeats)
    print_report("copy", roofs(), rows, columns, as_json)


app.command()(bench_speculation.speculate)
app.command()(bench_peers.peers)
