"""What reading n tokens at once costs beside one step: the prepared decoder at three widths, batch 1.

    python benchmarks/chunks.py --rounds 21

Models have fresh weights, whose matrices are decoded with in float32, or as `--weights` says. Everything is timed in
turn; a row is the median of the steps, and the medians of the ratios to the step of the same round. Prints a Markdown
table, and JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import Tensor

import kmixer
from kmixer.bench.measure import copied_bytes_per_second, matmul_flops_per_second, time_in_turn
from kmixer.generation.prepared import PreparedDecoder
from kmixer.models.causal_lm import DecodedIn
from kmixer.runs.environment import environment

# width, layers, vocabulary; and how many calls are timed as one, as the clock is coarse.
SIZES = ((64, 6, 65, 200), (256, 6, 4096, 20), (512, 8, 4096, 4))
LENGTHS = (1, 2, 4, 8, 16)


def measure(width: int, layers: int, vocabulary: int, calls: int, rounds: int, precision: DecodedIn) -> dict[str, Any]:
    """Seconds of a step, and of reading n tokens relative to it."""
    settings = [f"model.width={width}", f"model.layers={layers}", f"tokenizer.vocabulary_size={vocabulary}"]
    model = kmixer.LanguageModel.from_recipe("shakespeare-quick", settings).eval()
    decoder = PreparedDecoder(model, model.initial_state(1), precision=precision)
    tokens = torch.randint(vocabulary, (1, max(LENGTHS)))

    def reading(given: Tensor) -> Callable[[], None]:
        def read() -> None:
            for _ in range(calls):
                decoder.read(given)

        return read

    def step() -> None:
        for _ in range(calls):
            decoder.step(tokens[:, 0])

    timed_calls: dict[str, Callable[[], object]] = {"1": step}
    timed_calls |= {str(n): reading(tokens[:, :n]) for n in LENGTHS[1:]}
    timed = time_in_turn(timed_calls, rounds)
    return {
        "width": width,
        "layers": layers,
        "vocabulary": vocabulary,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "step_seconds": timed["1"]["seconds"] / calls,
        "relative": {n: times["relative"] for n, times in timed.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--weights", default="float32", choices=get_args(DecodedIn))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(1)
    print("| K-Stack | one step | " + " | ".join(f"{n} tokens" for n in LENGTHS[1:]) + " |")
    print("|---|---|" + "---|" * (len(LENGTHS) - 1))
    rows: list[dict[str, Any]] = []
    for width, layers, vocabulary, calls in SIZES:
        row = measure(width, layers, vocabulary, calls, arguments.rounds, arguments.weights)
        rows.append(row)
        relative = " | ".join(f"{row['relative'][str(n)]:.2f}" for n in LENGTHS[1:])
        print(f"| width {width}, {layers} layers | {1e6 * row['step_seconds']:,.1f} us | {relative} |", flush=True)
    roofs = {"flops_per_second": matmul_flops_per_second(), "copied_bytes_per_second": copied_bytes_per_second()}
    about = {"weights": arguments.weights, **roofs}
    print(json.dumps({"rows": rows, **about, "environment": environment(torch.device("cpu"))}))


if __name__ == "__main__":
    main()
