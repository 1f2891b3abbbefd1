"""The full state of a training run in one safetensors file.

There is no random state in it: the randomness of step s is a function of the seed, s and the process,
so a run that resumes at step s draws what the uninterrupted run drew.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kmixer.errors import InputError
from kmixer.models.weight_names import FORMAT, current_names
from kmixer.runs.run_folder import RunFolder
from kmixer.tensor_files import load_tensors, save_tensors
from kmixer.training.averaging import WeightAverage


@dataclass
class Progress:
    """Where a run stands, beside its weights and optimiser state."""

    step: int = 0
    seconds: float = 0.0  # of training and evaluation, over all sessions of the run
    best: dict[str, Any] | None = None  # {"step", "loss"} of the lowest validation loss
    loss_sum: float = 0.0  # training losses since the last line of metrics
    loss_count: int = 0
    metrics: dict[str, Any] = field(default_factory=dict)  # see RunFolder.metrics_mark
    corpus_sha256: str = ""
    recipe_sha256: str = ""  # of the run it belongs to, see kmixer.runs.integrity; empty in old ones


def save_checkpoint(
    run: RunFolder,
    model: nn.Module,
    optimizers: list[Optimizer],
    progress: Progress,
    average: WeightAverage | None = None,
) -> None:
    """Write the last checkpoint of a run atomically."""
    progress.metrics = run.metrics_mark()
    tensors = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    for name, state in _optimizer_states(model, optimizers):
        tensors |= {f"optimizer/{name}/{key}": tensor for key, tensor in state.items()}
    if average is not None:
        tensors |= {f"average/{name}": tensor for name, tensor in average.tensors.items()}
    save_tensors(run.checkpoint, tensors, {**asdict(progress), "format": FORMAT})


def load_checkpoint(
    run: RunFolder, model: nn.Module, optimizers: list[Optimizer], average: WeightAverage | None = None
) -> Progress:
    """Restore weights, their average if there is one, and optimiser state to the last checkpoint."""
    saved, metadata = load_tensors(run.checkpoint)
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "average": {}}
    for key, tensor in saved.items():
        part, _, name = key.partition("/")
        if part not in parts:
            raise InputError(f"{run.checkpoint} is not a checkpoint of a run: it holds the tensor {key}")
        parts[part][name] = tensor
    source, format = str(run.checkpoint), metadata.pop("format", 1)
    parts = {part: current_names(tensors, format, source) for part, tensors in parts.items()}
    expected = {"model": model.state_dict(), "average": {} if average is None else average.tensors}
    for part, tensors in expected.items():
        for name in sorted(tensors.keys() | parts[part].keys()):
            if name not in tensors or name not in parts[part] or parts[part][name].shape != tensors[name].shape:
                raise InputError(f"{run.checkpoint}: tensor {part}/{name} does not fit the recipe's model")
            tensors[name].copy_(parts[part][name])
    parameters = dict(model.named_parameters())
    for name, state in _optimizer_states(model, optimizers):
        prefix = f"{name}/"
        for key, tensor in parts["optimizer"].items():
            if key.startswith(prefix):
                state[key.removeprefix(prefix)] = tensor.to(parameters[name].device)
    return Progress(**metadata)


def _optimizer_states(model: nn.Module, optimizers: list[Optimizer]) -> list[tuple[str, dict[str, Any]]]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [
        (names[parameter], optimizer.state[parameter])
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]


def seed_of(seed: int, step: int, purpose: str) -> int:
    """A 63-bit seed for one purpose at one step of a run."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}/{purpose}".encode()).digest()[:8]) >> 1


def seed_step(generator: torch.Generator, seed: int, step: int, process: int) -> None:
    """Set the randomness of a step: of the batch, the same in all processes, and of dropout, one for each."""
    generator.manual_seed(seed_of(seed, step, "batch"))
    torch.manual_seed(seed_of(seed, step, f"dropout of process {process}"))
