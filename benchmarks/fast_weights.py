"""Time fast weights: training steps and decoding of a recipe's model with them and without, in turn.

    python benchmarks/fast_weights.py --batch 8 16 --rows 1 16 64

Fast weights are in two layers, the middle one and the last, with chunks of 64. Every training step with them follows
one without; of decoding, every chunk. Prints times and their ratios, and JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kmixer.bench.models import build, training_step
from kmixer.generation.decoder import Decoder, open_decoder
from kmixer.generation.prepared import PreparedDecoder
from kmixer.runs.environment import environment
from kmixer.runs.recipe import LanguageRecipe, load_language_recipe

CHUNK = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="shakespeare-quick")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--batch", type=int, nargs="*", default=[8, 16], help="windows of a training step")
    parser.add_argument("--pairs", type=int, default=20, help="of training steps")
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 16, 64], help="sequences that are decoded at once")
    parser.add_argument("--chunks", type=int, default=20, help="to decode")
    parser.add_argument("--copies", type=int, default=6, help="decoders of each kind")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    plain = load_language_recipe(arguments.recipe, [f"training.window={arguments.window}"])
    fast = load_language_recipe(
        arguments.recipe, [f"training.window={arguments.window}", f"model.fast_weights.chunk={CHUNK}"]
    )
    training = {batch: time_training(plain, fast, batch, arguments.pairs) for batch in arguments.batch}
    decoding = {
        rows: time_decoding(plain, fast, rows, CHUNK * arguments.chunks, arguments.copies) for rows in arguments.rows
    }
    print(json.dumps({"training": training, "decoding": decoding, "environment": environment(torch.device("cpu"))}))


def time_training(plain: LanguageRecipe, fast: LanguageRecipe, batch: int, pairs: int) -> dict[str, Any]:
    """Milliseconds of a training step without and with fast weights."""
    tokens = torch.randint(plain.tokenizer.vocabulary_size, (batch, plain.training.window + 1))
    steps = [training_step(build(recipe, "recipe").train(), recipe.training, tokens) for recipe in (plain, fast)]
    times = [tuple(seconds_of(step) for step in steps) for _ in range(pairs + 2)][2:]  # the first ones make room
    return report(f"training step, {batch} windows of {plain.training.window}", times)


@torch.inference_mode()
def time_decoding(plain: LanguageRecipe, fast: LanguageRecipe, rows: int, count: int, copies: int) -> dict[str, Any]:
    """Microseconds of a token of every sequence, without and with fast weights, and of the one that ends a chunk.

    Of as many decoders of both kinds, since where its memory lies can make one half as fast; the best of each counts.
    """
    models = [build(recipe, "recipe").eval() for recipe in (plain, fast)]
    tokens = torch.randint(plain.tokenizer.vocabulary_size, (count + CHUNK, rows))
    decoders = [open_decoder(model, model.initial_state(rows)) for _ in range(copies) for model in models]
    chunks = [[chunk_times(decoder, chunk) for decoder in decoders] for chunk in tokens.split(CHUNK)]
    times = [[1e6 * seconds for chunk in column for seconds in chunk] for column in zip(*chunks[1:], strict=True)]
    without, adapting = (min(times[kind::2], key=statistics.median) for kind in (0, 1))
    medians = [[statistics.median(column) for column in times[kind::2]] for kind in (0, 1)]
    result = {
        "unit": "us",
        "prepared": isinstance(decoders[1], PreparedDecoder),
        "median": [statistics.median(without), statistics.median(adapting)],
        "mean": [statistics.fmean(by_place(times)) for times in (without, adapting)],
        "slowest": max(by_place(adapting)),
        "medians_of_all_decoders": medians,
    }
    print(f"decoding, {rows} at once: ", end="")
    for name in ("median", "mean"):
        one, other = result[name]
        print(f"{name} {one:.1f} and {other:.1f} us, {other / one:.2f}; ", end="")
    print(f"the slowest, at the end of a chunk, {result['slowest']:.1f} us")
    return result


def by_place(times: list[float]) -> list[float]:
    """The median of every place in a chunk: what else the machine did at one token is not counted."""
    return [statistics.median(times[place::CHUNK]) for place in range(CHUNK)]


def chunk_times(decoder: Decoder, tokens: Tensor) -> list[float]:
    """Seconds of every token of a chunk (n, b): a decoder reads it alone, as it would."""
    return [seconds_of(partial(decoder.step, column)) for column in tokens.unbind()]


def seconds_of(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def report(name: str, times: list[tuple[float, ...]]) -> dict[str, Any]:
    """Milliseconds, fastest and median of both, and the ratios of the two, printed in a line."""
    plain, fast = zip(*times, strict=True)
    fastest = [min(plain) * 1e3, min(fast) * 1e3]
    medians = [statistics.median(plain) * 1e3, statistics.median(fast) * 1e3]
    ratio = statistics.median(with_fast / without for without, with_fast in times)
    print(f"{name}: fastest {fastest[0]:.1f} and {fastest[1]:.1f} ms, {fastest[1] / fastest[0]:.2f}; ", end="")
    print(f"median {medians[0]:.1f} and {medians[1]:.1f} ms, of the ratios {ratio:.2f}")
    return {"unit": "ms", "fastest": fastest, "median": medians, "median_ratio": ratio}


if __name__ == "__main__":
    main()
