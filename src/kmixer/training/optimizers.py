"""Optimisers and their parameter groups, and the learning-rate schedule.

* `grouped`  AdamW as the K-Operators author sets it: matrices and K0's gain at the learning rate with weight
  decay; biases, norms and logits at half of it, embeddings at three quarters, without.
* `simple`   AdamW with one learning rate; weight decay on everything with two dimensions or more but logits.
* `muon`     Muon (orthogonalised momentum) for the matrices of the layers, AdamW for everything else,
  grouped as in `simple`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from kmixer.runs.recipe import OptimizationConfig
from kmixer.training.muon import Muon

# Group of the author's `grouped` setting: (learning rate, weight decay) as factors.
GROUPS = {"core": (1.0, 1.0), "bias": (0.5, 0.0), "norm": (0.5, 0.0), "embedding": (0.75, 0.0), "logit": (0.5, 0.0)}


def build_optimizers(model: nn.Module, config: OptimizationConfig) -> list[Optimizer]:
    """The optimisers of a recipe over all parameters that train."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizers: list[Optimizer] = []
    if config.optimizer == "muon":
        assert config.muon_learning_rate is not None
        matrices = [parameters.pop(name) for name in list(parameters) if is_stack_matrix(name, parameters[name])]
        optimizers.append(Muon(matrices, lr=config.muon_learning_rate, weight_decay=config.weight_decay))
    factors: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        if config.optimizer == "grouped":
            key = GROUPS[author_group(name)]
        else:
            key = (1.0, 1.0 if parameter.ndim >= 2 and not name.endswith("_logit") else 0.0)
        factors.setdefault(key, []).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": members, "lr": config.learning_rate * rate, "weight_decay": config.weight_decay * decay}
        for (rate, decay), members in factors.items()
    ]
    optimizers.append(AdamW(groups, betas=config.betas, eps=1e-8, fused=True))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def author_group(name: str) -> str:
    """The group of a parameter in the author's `grouped` setting, by its name in `CausalLM`."""
    last = name.rsplit(".", 1)[-1]
    if name.startswith(("embedding.", "from_embedding.", "stack.value_embeddings.")):
        return "embedding"
    if last.endswith("_logit") or last in ("log_sigma", "stream_scale", "input_scale"):
        return "logit"
    if last == "bias":
        return "bias"
    if "norm." in name:
        return "norm"
    return "core"


def is_stack_matrix(name: str, parameter: torch.Tensor) -> bool:
    """Whether Muon trains it: matrices that act on channels.

    A base kernel acts on positions; a filter has a row of its own for every channel, logits one for every head.
    """
    outside = name.startswith(
        ("embedding.", "from_embedding.", "head.", "stack.value_embeddings.", "patches.", "positions")
    )
    no_matrix = name.endswith(("_logit", ".filter")) or "kernel." in name
    return parameter.ndim == 2 and not outside and not no_matrix


def learning_rate_factor(step: int, config: OptimizationConfig) -> float:
    """Factor on every learning rate at step 1, 2, ..., steps: linear warm-up, then a cosine to the floor."""
    s, warmup = step - 1, config.warmup_steps
    if s < warmup:
        return max(s, 1) / warmup
    floor = config.learning_rate_floor / config.learning_rate
    progress = (s - warmup) / max(1, config.steps - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rates(optimizers: list[Optimizer], factor: float) -> None:
    """Scale the learning rate of every group."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
