"""Optimisers and their parameter groups, and the learning-rate schedule.

* `grouped`  AdamW as Koneko sets it: matrices and K0's gain at the learning rate with weight decay; biases,
  norms and logits at half of it, embeddings at three quarters, without.
* `simple`   AdamW with one learning rate; weight decay on everything with two dimensions or more but logits.
* `muon`     Muon (orthogonalised momentum) for the matrices of the layers, AdamW for everything else,
  grouped as in `simple`.

Which parameter is what is said by its module; see `kmixer.layers.roles`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from kmixer.layers.roles import Group, Matrix, roles_of
from kmixer.runs.recipe import OptimizationConfig
from kmixer.training.muon import Muon

# Of every group of `grouped`: (learning rate, weight decay) as factors.
GROUPS: dict[Group, tuple[float, float]] = {
    "core": (1.0, 1.0),
    "bias": (0.5, 0.0),
    "norm": (0.5, 0.0),
    "embedding": (0.75, 0.0),
    "logit": (0.5, 0.0),
}


def build_optimizers(model: nn.Module, config: OptimizationConfig) -> list[Optimizer]:
    """The optimisers of a recipe over all parameters that train. Raises InputError for a parameter without a role."""
    roles = roles_of(model)
    matrices: dict[nn.Parameter, Matrix] = {}
    factors: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        role = roles[name]
        if not parameter.requires_grad:
            continue
        if config.optimizer == "muon" and role.matrix is not None:
            matrices[parameter] = role.matrix
            continue
        key = GROUPS[role.group] if config.optimizer == "grouped" else (1.0, float(role.decays))
        factors.setdefault(key, []).append(parameter)
    optimizers: list[Optimizer] = []
    if config.optimizer == "muon":
        assert config.muon_learning_rate is not None
        optimizers.append(Muon(matrices, lr=config.muon_learning_rate, weight_decay=config.weight_decay))
    groups: list[dict[str, Any]] = [
        {"params": members, "lr": config.learning_rate * rate, "weight_decay": config.weight_decay * decay}
        for (rate, decay), members in factors.items()
    ]
    optimizers.append(AdamW(groups, betas=config.betas, eps=1e-8, fused=True))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def norms_by_group(model: nn.Module, tensor_of: Callable[[str, nn.Parameter], Tensor | None]) -> dict[str, float]:
    """Norm of a tensor of every trained parameter, over each group of `grouped`."""
    roles = roles_of(model)
    squares: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        tensor = tensor_of(name, parameter) if parameter.requires_grad else None
        if tensor is not None:
            group = roles[name].group
            squares[group] = squares.get(group, 0.0) + float(tensor.detach().double().square().sum())
    return {group: math.sqrt(square) for group, square in squares.items()}


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
