"""Training steps on a GPU: K-Stacks and transformers of 25 and 350 million parameters, with torch.compile or not.

    python benchmarks/training_gpu.py --json training.json
    python benchmarks/training_gpu.py --device cpu --sizes trial        # tries every line, on any machine

bfloat16 autocast, AdamW, windows of 2,048, 65,536 tokens per step. A step is forward, backward, clipping and optimiser;
its time is the median of steps after three. The roof is the measured rate of a large bfloat16 product. GPT-2 of
transformers, with torch's attention, stands beside them where it is installed.
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

from kmixer.bench.peers import VOCABULARY, Peer, Size, build, present, training_step
from kmixer.models import CausalLM
from kmixer.runs.environment import environment

# The models, tokens of a window, and windows of a step.
SIZES = {
    "trial": (Size(32, 1, 16, 2), 16, 2),
    "25M": (Size(512, 17, 16, 8), 2048, 32),
    "350M": (Size(1024, 64, 16, 16), 2048, 32),
}
MODELS = ("kmixer K-Stack", "kmixer transformer", "transformers GPT-2")
PRODUCT = 8192  # rows of the matrices whose product is the roof


def median_seconds(call: Callable[[], object], device: str, repeats: int) -> tuple[float, float]:
    """Of the first call, and the median of those after the third."""
    seconds = []
    for _ in range(3 + repeats):
        began = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return seconds[0], statistics.median(seconds[3:])


def flops_per_second(device: str) -> float:
    rows = PRODUCT if device == "cuda" else 256
    a, b = (torch.randn(rows, rows, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * rows**3 / median_seconds(lambda: a @ b, device, 10)[1]


def measure(peer: Peer, size: str, device: str, repeats: int, flops: float, *, compiled: bool) -> dict[str, Any]:
    shape, window, windows = SIZES[size]
    model = build(peer, shape, window).to(device)
    if compiled and isinstance(model, CausalLM):
        model.compile_layers()
    elif compiled:
        model.compile()
    tokens = torch.randint(VOCABULARY, (windows, window + 1), device=device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    first, seconds = median_seconds(training_step(model, tokens, "bfloat16"), device, repeats)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    rate = window * windows / seconds
    return {
        "model": peer.name,
        "size": size,
        "compiled": compiled,
        "parameters": parameters,
        "first_step_seconds": first,
        "step_seconds": seconds,
        "tokens_per_second": rate,
        "part_of_roof": 6 * parameters * rate / flops,
        "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["25M", "350M"])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    flops = flops_per_second(given.device)
    print(f"{flops / 1e12:.2f} TFLOP/s of a bfloat16 product")
    rows = []
    for size in given.sizes:
        for peer in (peer for peer in present() if peer.name in MODELS):
            for compiled in (False, True):
                row = measure(peer, size, given.device, given.repeats, flops, compiled=compiled)
                rows.append(row)
                print(
                    f"{size:6} {peer.name:20} {'compiled' if compiled else 'eager':9}{row['parameters']:12,}"
                    f"{row['tokens_per_second']:14,.0f} tokens/s {row['part_of_roof']:6.1%} of the roof",
                    flush=True,
                )
    if given.json:
        about = {"flops_per_second": flops, "environment": environment(torch.device(given.device))}
        given.json.write_text(json.dumps({"rows": rows, **about}, indent=2) + "\n")


if __name__ == "__main__":
    main()
