"""Training steps on a GPU: K-Stacks and transformers of 25 and 350 million parameters, with torch.compile or not.

    python benchmarks/training_gpu.py --json training.json
    python benchmarks/training_gpu.py --device cpu --sizes trial        # tries every line, on any machine

bfloat16 autocast, AdamW, windows of 2,048, 65,536 tokens a step. A step is forward, backward, clipping and optimiser;
its time is the median of steps after three. The roof is the measured rate of a large bfloat16 product. GPT-2 of
transformers, with torch's attention, stands beside them where it is installed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kmixer.models import CausalLM, ModelConfig, TransformerConfig
from kmixer.runs.environment import environment

VOCABULARY = 4096
# Width, layers of the K-Stack and of the others, heads, tokens of a window, windows of a step.
SIZES = {
    "trial": (32, 1, 1, 2, 16, 2),
    "25M": (512, 17, 8, 8, 2048, 32),
    "350M": (1024, 64, 26, 16, 2048, 32),
}
PRODUCT = 8192  # rows of the matrices whose product is the roof


def build(kind: str, size: str) -> nn.Module:
    width, of_stack, layers, heads, window, _ = SIZES[size]
    torch.manual_seed(0)
    if kind == "k-stack":
        return CausalLM(ModelConfig(width=width, layers=of_stack, rank=16), VOCABULARY)
    if kind == "transformer":
        return CausalLM(TransformerConfig(width=width, layers=layers, heads=heads), VOCABULARY)
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {"n_positions": window, "n_embd": width, "n_layer": layers, "n_head": heads}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, bos_token_id=None, eos_token_id=None, **shape))


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    if isinstance(model, CausalLM):
        losses = model(tokens[:, :-1], targets=tokens[:, 1:]).losses
        assert losses is not None
        return losses.mean()
    logits: Tensor = model(tokens[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def training_step(model: nn.Module, tokens: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    device = tokens.device.type

    def step() -> None:
        with torch.autocast(device, torch.bfloat16):
            loss = loss_of(model, tokens)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


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


def measure(kind: str, size: str, device: str, repeats: int, flops: float, *, compiled: bool) -> dict[str, Any]:
    *_, window, windows = SIZES[size]
    model = build(kind, size).to(device)
    if compiled and isinstance(model, CausalLM):
        model.compile_layers()
    elif compiled:
        model.compile()
    tokens = torch.randint(VOCABULARY, (windows, window + 1), device=device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    first, seconds = median_seconds(training_step(model, tokens), device, repeats)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    rate = window * windows / seconds
    return {
        "kind": kind,
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
    kinds = ["k-stack", "transformer", *(["gpt2"] if find_spec("transformers") else [])]
    flops = flops_per_second(given.device)
    print(f"{flops / 1e12:.2f} TFLOP/s of a bfloat16 product")
    rows = []
    for size in given.sizes:
        for kind in kinds:
            for compiled in (False, True):
                row = measure(kind, size, given.device, given.repeats, flops, compiled=compiled)
                rows.append(row)
                print(
                    f"{size:6} {kind:12} {'compiled' if compiled else 'eager':9}{row['parameters']:12,}"
                    f"{row['tokens_per_second']:14,.0f} tokens/s {row['part_of_roof']:6.1%} of the roof",
                    flush=True,
                )
    if given.json:
        about = {"flops_per_second": flops, "environment": environment(torch.device(given.device))}
        given.json.write_text(json.dumps({"rows": rows, **about}, indent=2) + "\n")


if __name__ == "__main__":
    main()
