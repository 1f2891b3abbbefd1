"""Gaussian kernel attention: backends and blocks side by side, forward and backward, time and memory.

`one product` is how the definition is usually written down: squared distances from x x^T, all (t, t) weights
in memory, masked and renormalised.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kmixer.bench.measure import peak_resident_bytes, time_calls, time_in_turn
from kmixer.models.config import TransformerConfig
from kmixer.models.transformer import build_block
from kmixer.ops import gaussian_attention
from kmixer.state import tensors

# Largest difference from `naive` that a backend may show before it is timed.
TOLERANCE = 1e-4
HEADS, HEAD_WIDTH = 4, 64
WINDOWS = (None, 256)


def one_product(x: Tensor, log_sigma: Tensor, window: int | None = None) -> Tensor:
    """The definition by one matrix product."""
    squares = x.square().sum(-1)
    distances = squares[..., :, None] + squares[..., None, :] - 2 * x @ x.mT
    kernel = torch.exp(-0.5 * distances * torch.exp(-2 * log_sigma)[:, None, None])
    mask = torch.ones(x.shape[2], x.shape[2], dtype=torch.bool).tril()
    if window is not None:
        mask = mask.triu(1 - window)
    kernel = kernel * mask
    return kernel / kernel.sum(-1, keepdim=True) @ x


Way = Callable[[Tensor, Tensor, int | None], Tensor]
WAYS: dict[str, Way] = {
    "naive": lambda x, s, w: gaussian_attention(x, s, window=w, backend="naive"),
    "one product": one_product,
    "sdpa": lambda x, s, w: gaussian_attention(x, s, window=w, backend="sdpa"),
    "auto": lambda x, s, w: gaussian_attention(x, s, window=w),
}


def bench_backends(t: int, repeats: int) -> list[dict[str, Any]]:
    """A row a way and window: seconds of forward and backward, times faster than naive, peak memory."""
    x, log_sigma = _inputs(t)
    rows: list[dict[str, Any]] = []
    for window in WINDOWS:
        with torch.no_grad():
            exact = WAYS["naive"](x, log_sigma, window)
        for name, way in WAYS.items():
            with torch.no_grad():
                error = float((way(x, log_sigma, window) - exact).abs().max())
            if error > TOLERANCE:
                raise RuntimeError(f"{name} differs from naive by {error:.1e}: not timed")
            timing = time_calls(lambda way=way, window=window: _step(way, x, log_sigma, window), repeats)  # type: ignore[misc]
            rows.append({"what": name, "t": t, "window": window, "error": error, "seconds": timing.median})
        for row in rows[-len(WAYS) :]:
            row["times_faster"] = rows[-len(WAYS)]["seconds"] / row["seconds"]
            row["peak_bytes"] = _peak(row["what"], t, window)
    return rows


def bench_blocks(width: int, t: int, b: int, repeats: int) -> list[dict[str, Any]]:
    """A row a mixer: seconds of forward and backward of a whole block of nanochat, relative to softmax."""
    torch.manual_seed(0)
    x = torch.randn(b, t, width, requires_grad=True)
    calls: dict[str, Callable[[], object]] = {}
    caches = {}
    for mixer in ("softmax", "gaussian"):
        settings: dict[str, Any] = {"query_key_norm": True} if mixer == "softmax" else {}
        values = {"width": width, "layers": 1, "heads": width // HEAD_WIDTH, "mixers": [mixer], "blocks": "nanochat"}
        block = build_block(TransformerConfig.parse({**values, mixer: settings}, source="bench"), 0)
        what = f"{mixer} block"
        calls[what] = lambda block=block: block(x)[0].backward(torch.ones_like(x))  # type: ignore[misc]
        _, state = block(x)
        caches[what] = sum(z.numel() for z in tensors(state) if z.is_floating_point()) / (b * t)
    return [
        {"what": what, "width": width, "t": t, "b": b, "cache": caches[what], **timed}
        for what, timed in time_in_turn(calls, repeats).items()
    ]


def _inputs(t: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(1, HEADS, t, HEAD_WIDTH).requires_grad_()
    return x, torch.full((HEADS,), math.log(HEAD_WIDTH**0.5)).requires_grad_()


def _step(way: Way, x: Tensor, log_sigma: Tensor, window: int | None) -> None:
    y = way(x, log_sigma, window)
    y.backward(torch.ones_like(y))


def _peak(way: str, t: int, window: int | None) -> int:
    """Bytes that one forward and backward add to the peak of a fresh process."""
    program = "from kmixer.bench.gaussian import print_peak; import sys; print_peak(*sys.argv[1:])"
    command = [sys.executable, "-c", program, way, str(t), str(window or 0)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def print_peak(way: str, t: str, window: str) -> None:
    """The process `_peak` starts."""
    _step(WAYS[way], *_inputs(16), int(window) or None)  # what the first call loads
    x, log_sigma = _inputs(int(t))
    before = peak_resident_bytes()
    _step(WAYS[way], x, log_sigma, int(window) or None)
    print(peak_resident_bytes() - before)
