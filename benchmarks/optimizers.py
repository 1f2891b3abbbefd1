"""What clipping and the optimiser cost beside the passes of a training step, by size of the model.

    python benchmarks/optimizers.py --sizes 0.17M,4M --rounds 5

K-Stacks of `kmixer bench peers`, 2,048 random tokens in windows of 1,024, float32: forward and backward, the norm of
all gradients and their clipping, AdamW over all parameters, and Muon for the matrices with AdamW for the rest, timed in
turn. Prints a table, and JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from kmixer.bench.measure import time_in_turn
from kmixer.bench.peers import PEERS, SIZES, VOCABULARY, build, counted
from kmixer.runs.environment import environment
from kmixer.runs.recipe import OptimizationConfig
from kmixer.training.optimizers import build_optimizers

WINDOW, BATCH = 1024, 2


def measure(size: str, rounds: int) -> dict[str, Any]:
    """A row: the seconds of the passes, and of everything else as a part of these."""
    model = build(PEERS[0], SIZES[size], WINDOW).train()
    tokens = torch.randint(VOCABULARY, (BATCH, WINDOW + 1))
    shared = {"steps": 1, "batch_size": BATCH, "learning_rate": 1e-3, "learning_rate_floor": 0.0, "warmup_steps": 0}
    settings = {"simple": shared, "muon": shared | {"muon_learning_rate": 1e-3}}

    def passes() -> None:
        model.zero_grad(set_to_none=True)
        model(tokens[:, :-1], targets=tokens[:, 1:]).losses.mean().backward()

    def clip() -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)

    calls: dict[str, Callable[[], object]] = {"passes": passes, "clipping": clip}
    for name, values in settings.items():
        config = OptimizationConfig.parse({"optimizer": name, **values}, source="benchmark")
        optimizers = build_optimizers(model, config)
        calls[name] = lambda optimizers=optimizers: [optimizer.step() for optimizer in optimizers]
    timed = time_in_turn(calls, rounds)
    parts = {name: timed[name]["relative"] for name in calls if name != "passes"}
    return {"size": size, "parameters": counted(model), "passes_seconds": timed["passes"]["seconds"], **parts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="0.17M,0.84M,4M", help=f"of {', '.join(SIZES)}, a list")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    print(f"{'size':6} {'parameters':>12} {'passes':>10} {'clipping':>9} {'AdamW':>7} {'Muon':>7}  of the passes")
    for size in arguments.sizes.split(","):
        row = measure(size, arguments.rounds)
        rows.append(row)
        parts = f"{row['clipping']:9.1%} {row['simple']:7.1%} {row['muon']:7.1%}"
        print(f"{size:6} {row['parameters']:12,} {row['passes_seconds']:8.3f} s {parts}", flush=True)
    print(json.dumps({"rows": rows, "environment": environment(torch.device("cpu"))}))


if __name__ == "__main__":
    main()
