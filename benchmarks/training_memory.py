"""Memory of training steps beside models of other libraries of equal size: what two steps add to a fresh process.

    python benchmarks/training_memory.py --sizes 4M,25M

Batches of 2 windows of 1,024 tokens, AdamW, one thread, no dropout. Parameters, their gradients and AdamW's two
averages, 16 bytes a parameter, are part of it. Prints a table, and JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import torch

from kmixer.bench.measure import peak_of, peak_resident_bytes, resident_megabytes
from kmixer.bench.peers import OURS, PEERS, SIZES, VOCABULARY, build, counted, present, training_step
from kmixer.runs.environment import environment

WINDOW, BATCH, STEPS = 1024, 2, 2
PROGRAM = (
    "import sys; sys.path.insert(0, sys.argv[1]); from training_memory import print_peak; print_peak(*sys.argv[2:])"
)


def print_peak(peer: str, size: str, precision: Any) -> None:
    """The process that a row is measured in."""
    torch.set_num_threads(1)
    model = build(next(one for one in PEERS if one.name == peer), SIZES[size], WINDOW)
    before = 1e6 * resident_megabytes() - 4 * counted(model)
    step = training_step(model, torch.randint(VOCABULARY, (BATCH, WINDOW + 1)), precision)
    for _ in range(STEPS):
        step()
    print(round(peak_resident_bytes() - before))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="4M", help=f"of {', '.join(SIZES)}, a list")
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for size in arguments.sizes.split(","):
        for peer in present():
            peak = peak_of(PROGRAM, sys.path[0], peer.name, size, arguments.precision)
            ours = next((row["bytes"] for row in rows if (row["size"], row["model"]) == (size, OURS)), peak)
            rows.append({"size": size, "model": peer.name, "bytes": peak, "of_ours": peak / ours})
            print(f"{size:6} {peer.name:24} {peak / 2**20:8,.0f} MiB  {peak / ours:5.2f} of ours", flush=True)
    print(json.dumps({"precision": arguments.precision, "rows": rows, "environment": environment(torch.device("cpu"))}))


if __name__ == "__main__":
    main()
