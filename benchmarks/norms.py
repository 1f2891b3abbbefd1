"""Time norms in turn: RMSNorm, LayerNorm, tanh and erf in their place; alone, and inside a training step of a recipe.

    python benchmarks/norms.py --rounds 21

Alone on 4,096 rows, forward, and forward with its gradients and that of what is added to; compiled kernels and torch's
own operators. Every round times all of them once. Prints medians, their ratios to RMSNorm's, and JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kmixer.bench.measure import time_in_turn
from kmixer.bench.models import build, training_step
from kmixer.layers import Derf, DyT, RMSNorm
from kmixer.runs.environment import environment
from kmixer.runs.recipe import load_language_recipe

ROWS = 4096
REPEATS = 10  # of a call that takes less than a millisecond


class TorchDyT(DyT):
    """The same by torch's operators."""

    def keep(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, self.gain * torch.tanh(self.alpha * x)


class TorchDerf(Derf):
    """The same by torch's operators."""

    def keep(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, self.gain * torch.erf(self.alpha * x + self.shift)


class TorchLayerNorm(nn.LayerNorm):
    """torch's own."""

    def keep(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, F.layer_norm(x, self.normalized_shape, self.weight, None, self.eps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--widths", type=int, nargs="*", default=[64, 256])
    parser.add_argument("--recipe", default="shakespeare-quick", help="whose training step is timed")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--window", type=int, default=256)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    alone = {width: time_alone(width, arguments.rounds) for width in arguments.widths}
    step = time_step(arguments.recipe, arguments.batch, arguments.window, arguments.rounds)
    print(json.dumps({"alone": alone, "step": step, "environment": environment(torch.device("cpu"))}))


def time_alone(width: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of every norm on rows of a width, forward and with gradients."""
    torch.manual_seed(0)
    norms = {
        "rms": RMSNorm(width),
        "dyt": DyT(width),
        "derf": Derf(width),
        "torch layer": TorchLayerNorm(width, bias=False),
        "torch dyt": TorchDyT(width),
        "torch derf": TorchDerf(width),
    }
    x, gradient = torch.randn(ROWS, width, requires_grad=True), torch.randn(ROWS, width)

    def forward(norm: Any) -> None:
        with torch.no_grad():
            norm.keep(x)

    def both(norm: Any) -> None:
        kept, normed = norm.keep(x)
        torch.autograd.grad([kept, normed], [x, *norm.parameters()], [gradient, gradient])

    return {
        name: report(
            f"d {width}, {name}", time_in_turn({key: call(norm) for key, norm in norms.items()}, rounds), REPEATS
        )
        for name, call in (("forward", bound(forward)), ("forward and backward", bound(both)))
    }


def time_step(recipe: str, batch: int, window: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of a training step of a recipe with every kind of norm."""
    steps = {}
    for kind in ("rms", "dyt", "derf", "layer"):
        loaded = load_language_recipe(recipe, [f"training.window={window}", f"model.norm.kind={kind}"])
        tokens = torch.randint(loaded.tokenizer.vocabulary_size, (batch, window + 1))
        steps[kind] = training_step(build(loaded, "recipe").train(), loaded.training, tokens)
    return report(f"{recipe}, a step of {batch} x {window}", time_in_turn(steps, rounds))


def bound(call: Callable[[Any], None]) -> Callable[[Any], Callable[[], None]]:
    """Of a norm, what makes the call as often as lets it be timed."""

    def repeated(norm: Any) -> None:
        for _ in range(REPEATS):
            call(norm)

    return lambda norm: lambda: repeated(norm)


def report(what: str, times: dict[str, dict[str, float]], repeats: int = 1) -> dict[str, Any]:
    """Milliseconds and ratios to the first, printed in a line."""
    result = {
        name: {"milliseconds": 1e3 * timed["seconds"] / repeats, "ratio": timed["relative"]}
        for name, timed in times.items()
    }
    said = (f"{name} {one['milliseconds']:.3f} ms ({one['ratio']:.2f})" for name, one in result.items())
    print(f"{what}: {', '.join(said)}")
    return result


if __name__ == "__main__":
    main()
