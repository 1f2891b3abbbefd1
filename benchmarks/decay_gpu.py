"""Decayed linear attention on a GPU: time of the operator, and its share of the measured copy bandwidth.

    python benchmarks/decay_gpu.py [--dtype bfloat16|float32] [--operators NAME ...] [--json FILE]

Batch times length is 65,536 everywhere. Each time is the median of runs between CUDA events, the cache
flushed before each; agreement with `block` in float64 is checked before. The bound moves every input and
output once: q, k, v and y forward; these again with dy, dq, dk and dv backward.

chunk_gla and chunk_simple_gla are flash-linear-attention's, where it is installed. chunk_gla gets its
gates (b, t, r) ready made. chunk_simple_gla has one decay for all ranks and no gradient for it: another, smaller
operation, timed but not compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kmixer.ops import decayed_linear_attention
from kmixer.runs.environment import environment

POSITIONS = 65_536
SIZES = ((4, 64), (32, 128), (64, 512))  # r, d
LENGTHS = (256, 2048, 16_384, 65_536)
# `mask` holds several tensors (b, t, r, d).
MASK_LIMIT = 2**30
MASK_LENGTH = 256
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
NAMES = ("y", "dq", "dk", "dv", "dlog_decay")

Operator = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def own(backend: Any) -> Operator:
    return lambda q, k, v, log_decay: decayed_linear_attention(q, k, v, log_decay, backend=backend)[0]


def chunk_gla(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Tensor:
    from fla.ops.gla import chunk_gla

    return chunk_gla(q[:, :, None], k[:, :, None], v[:, :, None], gates[:, :, None], scale=1.0)[0][:, :, 0]


def chunk_simple_gla(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    from fla.ops.simple_gla import chunk_simple_gla

    gamma = log_decay.detach()[:1].float()
    return chunk_simple_gla(q[:, :, None], k[:, :, None], v[:, :, None], g_gamma=gamma, scale=1.0)[0][:, :, 0]


OPERATORS: dict[str, Operator] = {"triton": own("triton"), "block": own("block"), "mask": own("mask")}
if find_spec("fla") is not None:
    OPERATORS |= {"chunk_gla": chunk_gla, "chunk_simple_gla": chunk_simple_gla}


def make_inputs(t: int, r: int, d: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v, log_decay and dy."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(size: int) -> Tensor:
        return torch.randn(POSITIONS // t, t, size, device="cuda", generator=generator).to(dtype)

    log_decay = torch.linspace(0.9, 0.999, r, device="cuda").log()
    return [normal(r) / r**0.5, normal(r), normal(d), log_decay, normal(d)]


def forward_and_backward(operator: Operator, leaves: list[Tensor], dy: Tensor) -> list[Tensor]:
    y = operator(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy, allow_unused=True)]


def worst_error(actual: list[Tensor], expected: list[Tensor]) -> dict[str, float]:
    """Largest difference of y and of each gradient, relative to the largest value."""
    errors = {}
    for name, value, exact in zip(NAMES, actual, expected, strict=True):
        value = value.double()
        if value.shape != exact.shape:  # gates (b, t, r): their gradients add up to that of the decays
            value = value.sum((0, 1))
        errors[name] = ((value - exact).abs().max() / exact.abs().max()).item()
    return errors


def median_seconds(call: Callable[[], object], flush: Tensor, repeats: int) -> float:
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        flush.zero_()
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        call()
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended) / 1000)
    return statistics.median(times)


def measure(name: str, t: int, r: int, d: int, arguments: argparse.Namespace, flush: Tensor, copy: float) -> Any:
    dtype = getattr(torch, arguments.dtype)
    *inputs, dy = make_inputs(t, r, d, dtype)
    exact = [x.double().requires_grad_() for x in inputs]
    expected = forward_and_backward(OPERATORS["block"], exact, dy.double())
    if name == "chunk_gla":
        inputs[3] = inputs[3].expand(POSITIONS // t, t, r).contiguous()
    leaves = [x.requires_grad_() for x in inputs]
    operator = OPERATORS[name]

    errors = None
    if name != "chunk_simple_gla":
        errors = worst_error(forward_and_backward(operator, leaves, dy), expected)
        if name == "triton" and max(errors.values()) > TOLERANCE[dtype]:
            sys.exit(f"error: triton disagrees with block in float64 at t {t}, r {r}, d {d}: {errors}; nothing timed")
    del exact, expected

    with torch.no_grad():
        forward = median_seconds(lambda: operator(*leaves), flush, arguments.repeats)
    both = median_seconds(lambda: forward_and_backward(operator, leaves, dy), flush, arguments.repeats)
    forward_bytes = POSITIONS * (2 * r + 2 * d) * dtype.itemsize
    backward_bytes = forward_bytes + POSITIONS * (2 * r + d) * dtype.itemsize
    return {
        "operator": name,
        "t": t,
        "r": r,
        "d": d,
        "forward_seconds": forward,
        "forward_backward_seconds": both,
        "forward_percent_of_copy": 100 * forward_bytes / copy / forward,
        "forward_backward_percent_of_copy": 100 * (forward_bytes + backward_bytes) / copy / both,
        "errors": errors,
    }


def bytes_copied_per_second(flush: Tensor, repeats: int) -> float:
    """Bytes read and written in a second by a copy, whose memory is free again when this returns."""
    source, target = (torch.zeros(2**30, dtype=torch.uint8, device="cuda") for _ in range(2))
    return 2 * source.numel() / median_seconds(lambda: target.copy_(source), flush, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--operators", nargs="+", choices=list(OPERATORS), default=list(OPERATORS))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: this benchmark needs a CUDA GPU, and torch finds none")

    flush = torch.empty(2**28, dtype=torch.uint8, device="cuda")  # larger than the second-level cache of any card
    copy = bytes_copied_per_second(flush, arguments.repeats)
    print(f"{torch.cuda.get_device_name()}: copies {copy / 1e12:.2f} TB/s; {arguments.dtype}, b t = {POSITIONS:,}")

    rows = []
    for r, d in SIZES:
        for t in LENGTHS:
            for name in arguments.operators:
                if name == "mask" and (t > MASK_LENGTH or POSITIONS * r * d > MASK_LIMIT):
                    continue
                row = measure(name, t, r, d, arguments, flush, copy)
                rows.append(row)
                print(
                    f"r {r:3} d {d:4} t {t:6} {name:17}"
                    f"{row['forward_seconds'] * 1e6:10,.0f} us {row['forward_percent_of_copy']:5.1f} %"
                    f"{row['forward_backward_seconds'] * 1e6:12,.0f} us"
                    f" {row['forward_backward_percent_of_copy']:5.1f} %",
                    flush=True,
                )
    if arguments.json:
        packages = {name: metadata.version(name) for name in ("triton", "flash-linear-attention") if _installed(name)}
        result = {
            "copy_bytes_per_second": copy,
            "dtype": arguments.dtype,
            "rows": rows,
            "packages": packages,
            "environment": environment(torch.device("cuda")),
        }
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


def _installed(package: str) -> bool:
    return any(distribution.name == package for distribution in metadata.distributions())


if __name__ == "__main__":
    main()
