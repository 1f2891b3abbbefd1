"""A prepared decoding step of one sequence beside the time that reading its weights takes, by precision of these; and a
prompt beside the roof of matrix products.

    python benchmarks/decoding.py --rounds 11

K-Stacks and softmax transformers of about 4, 25 and 87 million fresh weights, after 2,048 tokens. Steps of all
precisions, of the model called token by token, and a sum over as many bytes as the float32 matrices have, are timed in
turn; a row is the median of the steps, and the medians of the ratios of the same round. So are a prompt of as many
tokens, read by the model, and a large product. Prints tables, and JSON.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable
from typing import Any, get_args

import torch

from kmixer.bench.measure import MATRIX, time_in_turn
from kmixer.generation.decoder import Decoder, EagerDecoder
from kmixer.generation.prepared import PreparedDecoder
from kmixer.models import CausalLM, ModelConfig, TransformerConfig
from kmixer.models.causal_lm import DecodedIn
from kmixer.models.flops import count_flops
from kmixer.runs.environment import environment

VOCABULARY = 256
BITS = {"float32": 32, "bfloat16": 16, "int8": 8, "eager": 32}
# Width: layers of the K-Stack and of the transformer, heads, and how many steps are timed as one.
SIZES = {256: (10, 5, 4, 10), 512: (17, 8, 8, 3), 768: (27, 12, 12, 1)}


def build(kind: str, width: int) -> CausalLM:
    """A model of this kind, and about as many parameters as the other."""
    layers_of_stack, layers, heads, _ = SIZES[width]
    torch.manual_seed(0)
    if kind == "k-stack":
        values: dict[str, Any] = {"width": width, "layers": layers_of_stack, "rank": 16}
        return CausalLM(ModelConfig.parse(values, source="benchmark"), VOCABULARY).eval()
    values = {"kind": "transformer", "width": width, "layers": layers, "heads": heads}
    return CausalLM(TransformerConfig.parse(values, source="benchmark"), VOCABULARY).eval()


def measure(kind: str, width: int, context: int, rounds: int) -> list[dict[str, Any]]:
    """A row for every precision, and one for the model called token by token."""
    model, steps = build(kind, width), SIZES[width][-1]
    with torch.inference_mode():
        state = model(torch.randint(VOCABULARY, (1, context))).state
    decoders: dict[str, Decoder] = {name: PreparedDecoder(model, state, precision=name) for name in get_args(DecodedIn)}
    decoders["eager"] = EagerDecoder(model, state)
    matrices = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 2)
    memory, token = torch.zeros(matrices), torch.zeros(1, dtype=torch.int64)

    @torch.inference_mode()
    def step(decoder: Decoder) -> None:
        for _ in range(steps):
            decoder.step(token)

    calls: dict[str, Callable[[], object]] = {name: functools.partial(step, one) for name, one in decoders.items()}
    timed = time_in_turn({**calls, "reading": memory.sum}, rounds)
    reading = timed["reading"]["seconds"]
    return [
        {
            "kind": kind,
            "width": width,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "weights": name,
            "seconds": timed[name]["seconds"] / steps,
            "over_float32": timed[name]["relative"],
            "over_reading": timed[name]["seconds"] / steps / (reading * BITS[name] / 32),
            "bytes_a_second": 4 * matrices / reading,
        }
        for name in decoders
    ]


def measure_prompt(kind: str, width: int, context: int, rounds: int) -> dict[str, Any]:
    """How long a prompt takes, and which share that is of the operations of large matrix products."""
    model = build(kind, width)
    prompt = torch.randint(VOCABULARY, (1, context))
    square = torch.randn(MATRIX, MATRIX)

    @torch.inference_mode()
    def read() -> object:
        return model(prompt)

    timed = time_in_turn({"product": lambda: square @ square, "prompt": read}, rounds)
    operations = count_flops(model, context) * context
    return {
        "kind": kind,
        "width": width,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": timed["prompt"]["seconds"],
        "operations": operations,
        "part_of_roof": operations / (2 * MATRIX**3) / timed["prompt"]["relative"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", default=",".join(map(str, SIZES)))
    parser.add_argument("--kinds", default="k-stack,softmax")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=11)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    print(
        "| stack | parameters | weights | ms per token | over float32 | over reading them |\n|---|---|---|---|---|---|"
    )
    for width in map(int, given.widths.split(",")):
        for kind in given.kinds.split(","):
            for row in measure(kind, width, given.context, given.rounds):
                rows.append(row)
                print(
                    f"| {kind}, d {width} | {row['parameters']:,} | {row['weights']} | {1e3 * row['seconds']:.3f} | "
                    f"{row['over_float32']:.2f} | {row['over_reading']:.2f} |",
                    flush=True,
                )
    prompts = []
    print(f"\n| stack | parameters | prompt of {given.context:,}, s | part of roof |\n|---|---|---|---|")
    for width in map(int, given.widths.split(",")):
        for kind in given.kinds.split(","):
            row = measure_prompt(kind, width, given.context, given.rounds)
            prompts.append(row)
            figures = f"{row['parameters']:,} | {row['seconds']:.2f} | {row['part_of_roof']:.2f}"
            print(f"| {kind}, d {width} | {figures} |", flush=True)
    report = {
        "environment": environment(torch.device("cpu")),
        "context": given.context,
        "rounds": given.rounds,
        "rows": rows,
        "prompts": prompts,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
