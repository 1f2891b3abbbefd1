"""Tokens a second of training steps and of decoding, for recipes of the package, on this machine's CPU.

    python benchmarks/throughput.py --threads 2 [--recipes NAME ...] [--json FILE]

A training step is what the training loop does between two batches: forward, backward, clipping,
optimiser. Decoding is one token at a time from a carried state, batch 1, greedy. Medians of five
or more after a warm-up.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kmixer.models import CausalLM
from kmixer.training.optimizers import build_optimizers
from kmixer.training.recipe import Recipe, load_recipe
from kmixer.training.run_folder import environment

RECIPES = ["k-operators-v2-shakespeare", "k-operators-local-shakespeare"]
DECODED = 200


def median_seconds(call: Callable[[], None], repeats: int) -> float:
    call()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def training_rate(recipe: Recipe, precision: str, repeats: int) -> float:
    config = recipe.training
    torch.manual_seed(0)
    model = CausalLM(recipe.model, recipe.tokenizer.vocabulary_size)
    optimizers = build_optimizers(model, config)
    tokens = torch.randint(model.vocabulary_size, (config.batch_size, config.window + 1))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            loss = model(tokens[:, :-1], targets=tokens[:, 1:]).losses.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return config.batch_size * config.window / median_seconds(step, repeats)


@torch.inference_mode()
def decoding_rate(recipe: Recipe, repeats: int) -> float:
    model = CausalLM(recipe.model, recipe.tokenizer.vocabulary_size).eval()

    def decode() -> None:
        token, state = torch.zeros(1, 1, dtype=torch.long), model.initial_state(1)
        for _ in range(DECODED):
            output = model(token, state)
            assert output.logits is not None
            token, state = output.logits.argmax(-1), output.state

    return DECODED / median_seconds(decode, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows: list[dict[str, Any]] = []
    for name in arguments.recipes:
        recipe = load_recipe(name)
        for precision in ("float32", "bfloat16"):
            rate = training_rate(recipe, precision, arguments.repeats)
            rows.append({"recipe": name, "what": "training", "precision": precision, "tokens_per_second": rate})
        rate = decoding_rate(recipe, arguments.repeats)
        rows.append({"recipe": name, "what": "decoding", "precision": "float32", "tokens_per_second": rate})
        for row in rows[-3:]:
            print(
                f"{name:32}{row['what']:10}{row['precision']:10}{row['tokens_per_second']:>12,.0f} tokens/s", flush=True
            )
    if arguments.json:
        result = {"threads": arguments.threads, "rows": rows, "environment": environment(torch.device("cpu"))}
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
