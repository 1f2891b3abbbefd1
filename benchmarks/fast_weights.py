"""Time fast weights: training steps and decoding of a recipe's model with them and without, in turn.

    python benchmarks/fast_weights.py --batch 8 16 --rows 1 16 64

Fast weights are in two layers, the middle one and the last, with chunks of 64. Every training step with them follows
one without; of decoding, every token. Prints fastest and median times and their ratios, and JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kmixer.bench.models import build, training_step
from kmixer.generation.decoder import open_decoder
from kmixer.generation.prepared import PreparedDecoder
from kmixer.models import CausalLM
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
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    plain = load_language_recipe(arguments.recipe, [f"training.window={arguments.window}"])
    fast = load_language_recipe(
        arguments.recipe, [f"training.window={arguments.window}", f"model.fast_weights.chunk={CHUNK}"]
    )
    training = {batch: time_training(plain, fast, batch, arguments.pairs) for batch in arguments.batch}
    decoding = {rows: time_decoding(plain, fast, rows, CHUNK * arguments.chunks) for rows in arguments.rows}
    print(json.dumps({"training": training, "decoding": decoding, "environment": environment(torch.device("cpu"))}))


def time_training(plain: LanguageRecipe, fast: LanguageRecipe, batch: int, pairs: int) -> dict[str, Any]:
    """Milliseconds of a training step without and with fast weights."""
    tokens = torch.randint(plain.tokenizer.vocabulary_size, (batch, plain.training.window + 1))
    steps = [training_step(build(recipe, "recipe").train(), recipe.training, tokens) for recipe in (plain, fast)]
    times = in_turn(steps, pairs + 2)[2:]  # the first ones make room
    return report(f"training step, {batch} windows of {plain.training.window}", times, 1e3, "ms")


@torch.inference_mode()
def time_decoding(plain: LanguageRecipe, fast: LanguageRecipe, rows: int, count: int) -> dict[str, Any]:
    """Microseconds of a token of every sequence, without and with fast weights; and of those that end a chunk."""
    models = [build(recipe, "recipe").eval() for recipe in (plain, fast)]
    tokens = torch.randint(plain.tokenizer.vocabulary_size, (count + CHUNK, rows))
    steps = [decoding_step(model, tokens) for model in models]
    times = in_turn(steps, len(tokens))[CHUNK:]
    result = report(f"decoding, {rows} at once", times, 1e6, "us")
    last = [with_fast * 1e6 for _, with_fast in times[CHUNK - 1 :: CHUNK]]
    means = [statistics.fmean(column) * 1e6 for column in zip(*times, strict=True)]
    print(f"  mean {means[0]:.1f} and {means[1]:.1f} us: {means[1] / means[0]:.2f}; ends of chunks, median ", end="")
    print(f"{statistics.median(last):.1f} us; the slowest {max(fast_one for _, fast_one in times) * 1e6:.1f} us")
    prepared = isinstance(open_decoder(models[1], models[1].initial_state(rows)), PreparedDecoder)
    return {**result, "mean": means, "ends_of_chunks": statistics.median(last), "prepared": prepared}


def decoding_step(model: CausalLM, tokens: Tensor) -> Callable[[], object]:
    """A call that reads the next of tokens (n, b)."""
    decoder = open_decoder(model, model.initial_state(tokens.shape[1]))
    columns = iter(tokens.unbind())
    return lambda: decoder.step(next(columns))


def in_turn(calls: list[Callable[[], object]], rounds: int) -> list[tuple[float, ...]]:
    """Seconds of every call in every round."""
    times = []
    for _ in range(rounds):
        seconds = []
        for call in calls:
            began = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - began)
        times.append(tuple(seconds))
    return times


def report(name: str, times: list[tuple[float, ...]], factor: float, unit: str) -> dict[str, Any]:
    """Fastest and median of both, and the ratios of the two, printed in a line."""
    plain, fast = zip(*times, strict=True)
    fastest = [min(plain) * factor, min(fast) * factor]
    medians = [statistics.median(plain) * factor, statistics.median(fast) * factor]
    ratio = statistics.median(with_fast / without for without, with_fast in times)
    print(f"{name}: fastest {fastest[0]:.1f} and {fastest[1]:.1f} {unit}, {fastest[1] / fastest[0]:.2f}; ", end="")
    print(f"median {medians[0]:.1f} and {medians[1]:.1f} {unit}, of the ratios {ratio:.2f}")
    return {"unit": unit, "fastest": fastest, "median": medians, "median_ratio": ratio}


if __name__ == "__main__":
    main()
