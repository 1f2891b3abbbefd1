"""Time Sinkhorn attention beside softmax attention, forward and backward, and what a step adds to the peak memory.

    python benchmarks/sinkhorn.py --rounds 9

Heads of width 32 that see both ways. Every round computes all of them once; the first is softmax attention by its
compiled kernel. Prints medians, their ratios to it, peaks of fresh processes, and JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kmixer.bench.measure import peak_of, peak_resident_bytes, time_in_turn
from kmixer.ops import sinkhorn_attention
from kmixer.ops.attention.softmax import sdpa_attention, softmax_attention
from kmixer.runs.environment import environment

E = 32
Way = Callable[..., Tensor]
WAYS: dict[str, Way] = {
    "softmax": lambda q, k, v: softmax_attention(q, k, v, causal=False),
    "softmax, torch": lambda q, k, v: sdpa_attention(q, k, v, causal=False),
    "n = 3": lambda q, k, v: sinkhorn_attention(q, k, v, iterations=3),
    "n = 5": lambda q, k, v: sinkhorn_attention(q, k, v, iterations=5),
    "n = 5, blocked": lambda q, k, v: sinkhorn_attention(q, k, v, iterations=5, backend="blocked"),
    "n = 5, naive": lambda q, k, v: sinkhorn_attention(q, k, v, iterations=5, backend="naive"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--t", type=int, nargs="*", default=[64, 256, 512, 1024])
    parser.add_argument("--rows", type=int, default=16, help="batch rows times heads")
    parser.add_argument("--peak-t", type=int, default=1024, help="positions of the step whose memory is measured")
    parser.add_argument("--peak-rows", type=int, default=16)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    times = {t: time_ways(t, arguments.rows, arguments.rounds) for t in arguments.t}
    peaks = measure_peaks(arguments.peak_t, arguments.peak_rows)
    print(json.dumps({"times": times, "peaks": peaks, "environment": environment(torch.device("cpu"))}))


def inputs(t: int, rows: int) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, rows, t, E).requires_grad_() for _ in range(3)]


def step(way: Way, tensors: list[Tensor]) -> None:
    """Forward and backward; gradients of an earlier step are let go of first, as an optimiser does."""
    for tensor in tensors:
        tensor.grad = None
    way(*tensors).sum().backward()


def time_ways(t: int, rows: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of a step, and their ratios to softmax attention's."""
    tensors = inputs(t, rows)
    timed = time_in_turn({name: lambda way=way: step(way, tensors) for name, way in WAYS.items()}, rounds)  # type: ignore[misc]
    result = {name: {"milliseconds": 1e3 * one["seconds"], "ratio": one["relative"]} for name, one in timed.items()}
    print(
        f"t {t}: "
        + ", ".join(f"{name} {one['milliseconds']:.1f} ms ({one['ratio']:.2f})" for name, one in result.items())
    )
    return result


def measure_peaks(t: int, rows: int) -> dict[str, Any]:
    """Megabytes that a step adds to the peak of a fresh process, and their ratios to softmax attention's."""
    program = f"import sys; sys.path.insert(0, {sys.path[0]!r}); import sinkhorn; sinkhorn.print_peak(*sys.argv[1:])"
    peaks = {name: peak_of(program, name, str(t), str(rows)) / 1e6 for name in WAYS}
    result = {name: {"megabytes": peak, "ratio": peak / peaks["softmax"]} for name, peak in peaks.items()}
    said = (f"{name} {one['megabytes']:.1f} MB ({one['ratio']:.2f})" for name, one in result.items())
    print(f"peak of a step, t {t}, {rows} rows: " + ", ".join(said))
    return result


def print_peak(name: str, t: str, rows: str) -> None:
    """The process that `measure_peaks` starts."""
    torch.set_num_threads(1)
    step(WAYS[name], inputs(16, 2))  # what the first call loads
    tensors = inputs(int(t), int(rows))
    before = peak_resident_bytes()
    step(WAYS[name], tensors)
    print(peak_resident_bytes() - before)


if __name__ == "__main__":
    main()
