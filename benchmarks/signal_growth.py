"""Growth of gradients against theory, the long forms: random stacks of several widths and mixings, depth, and the laws.

    python -m benchmarks.signal_growth --initialisations 16 --json signal.json

Strengths of a ViT-L (s_ov = 0.168, s_21 = 0.671), ReLU, tokens with q = 1 and p = 0.2. Prints J(L, 0) of the recurrence
at four depths, measured over predicted J(L, 0) with its standard error, how often noise of 3 % leaves the right law the
smaller residual, and JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from tests.measure.random_stack import S_21, S_OV, causal, convolution, decaying, random_growth, symmetric, uniform
from torch import Tensor

from kmixer.measure.mean_field import TheoryBlock, predict
from kmixer.measure.moments import NormMap
from kmixer.runs.environment import environment

NORMS = {
    "layer": NormMap("standard"),
    "erf 0.3": NormMap("erf", 0.3),
    "erf 0.5": NormMap("erf", 0.5),
    "erf 0.9": NormMap("erf", 0.9),
    "tanh 0.5": NormMap("tanh", 0.5),
}
DEPTHS = (12, 24, 48, 96)
MIXINGS = {"uniform": uniform, "causal": causal, "convolution": convolution, "decay 0.9": decaying}
TOKENS, BLOCKS = 16, 12
NOISE, DRAWS = 0.03, 200


def predicted(norm: NormMap, mixing: Tensor, depth: int) -> list[float]:
    """log J(L, l) of the recurrence."""
    block = TheoryBlock(norm, mixing, S_OV, norm, "relu", math.sqrt(S_21), math.sqrt(S_21))
    growth = predict([block] * depth, symmetric(len(mixing))[None]).growth[0]
    return growth.log().tolist()


def ratio(norm: NormMap, mixing: Tensor, width: int, count: int) -> dict[str, float]:
    """Measured over predicted J(L, 0): geometric mean and its relative standard error, over initialisations."""
    measured = torch.tensor([random_growth(norm, mixing, width, BLOCKS, seed) for seed in range(count)]).log()
    theory = predicted(norm, mixing, BLOCKS)[0]
    return {
        "theory": math.exp(theory),
        "ratio": math.exp(float(measured.mean()) - theory),
        "error": float(measured.std()) / math.sqrt(count),
        "of_one": float(measured.std()),
    }


def right_law(norm: NormMap, depth: int, generator: torch.Generator) -> float:
    """How often the law of this norm has the smaller residual."""
    log = torch.tensor(predicted(norm, uniform(197), depth), dtype=torch.float64)
    x = torch.arange(1, depth + 2, dtype=torch.float64)
    noise = NOISE * torch.randn(DRAWS, depth + 1, generator=generator, dtype=torch.float64)
    y = log + noise
    residuals = [_residuals(coordinate, y) for coordinate in (x.log(), x.sqrt())]
    power_wins = (residuals[0] < residuals[1]).double().mean()
    return float(power_wins if norm.kind == "standard" else 1 - power_wins)


def _residuals(x: Tensor, y: Tensor) -> Tensor:
    x, y = x - x.mean(), y - y.mean(-1, keepdim=True)
    slope = (y @ x) / (x @ x)
    return (y - slope[:, None] * x).square().sum(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--initialisations", type=int, default=16)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    begun = time.monotonic()
    result: dict[str, Any] = {"depth": {}, "width": {}, "mixing": {}, "law": {}}
    print("J(L, 0) by the recurrence, 197 tokens that see each other, at 12, 24, 48, 96 blocks")
    for name, norm in NORMS.items():
        values = [math.exp(predicted(norm, uniform(197), depth)[0]) for depth in DEPTHS]
        result["depth"][name] = values
        print(f"{name:10}" + "".join(f"{value:10.4g}" for value in values))
    print(f"measured over predicted, {BLOCKS} blocks, {TOKENS} tokens, by width; of one initialisation")
    for name in ("layer", "erf 0.5"):
        for width in (64, 128, 256):
            row = ratio(NORMS[name], uniform(TOKENS), width, arguments.initialisations)
            result["width"][f"{name}, {width}"] = row
            print(f"{name:10}{width:>5}  {row['ratio']:.3f} +- {row['error']:.3f}   {row['of_one']:.1%}")
    print("the same at width 128, by mixing; predicted J(L, 0)")
    for mixing, make in MIXINGS.items():
        for name in ("layer", "erf 0.5"):
            row = ratio(NORMS[name], make(TOKENS), 128, arguments.initialisations)
            result["mixing"][f"{mixing}, {name}"] = row
            print(f"{mixing:12}{name:10}{row['theory']:8.4g}  {row['ratio']:.3f} +- {row['error']:.3f}")
    print(f"the right law has the smaller residual, of {DRAWS} draws with {NOISE:.0%} noise, at 6, 12, 24, 48 blocks")
    generator = torch.Generator().manual_seed(0)
    for name in ("layer", "erf 0.5"):
        shares = [right_law(NORMS[name], depth, generator) for depth in (6, 12, 24, 48)]
        result["law"][name] = shares
        print(f"{name:10}" + "".join(f"{share:8.0%}" for share in shares))
    result |= {"seconds": time.monotonic() - begun, "environment": environment(torch.device("cpu"))}
    print(json.dumps(result))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
