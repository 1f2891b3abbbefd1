"""The processes that train one model together: one, or several that accelerate has started.

What the loop asks of them is one interface, so that nothing else knows how many there are.
"""

from __future__ import annotations

import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from kmixer.errors import InputError
from kmixer.runs.recipe import AnyRecipe

# How torchrun, accelerate launch and the MPI starters say how many processes there are.
COUNTS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


class Processes(ABC):
    """This process among those that train one model."""

    rank: int
    count: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes what all of them share."""
        return self.rank == 0

    def share(self, batch: Tensor) -> Tensor:
        """This process's examples of a batch, which all processes drew alike."""
        return batch[self.rank :: self.count]

    @abstractmethod
    def wait(self) -> None:
        """Until all processes have come here."""

    @abstractmethod
    def main_first(self) -> AbstractContextManager[Any]:
        """Within it the main process goes ahead, and the others use what it has written."""

    @abstractmethod
    def prepare(self, model: nn.Module) -> nn.Module:
        """The model as it is called in training: its gradients are the mean over all processes."""

    @abstractmethod
    def without_exchange(self, network: nn.Module) -> AbstractContextManager[Any]:
        """Within it a backward pass adds to the gradients of this process alone."""

    @abstractmethod
    def mean(self, value: Tensor) -> Tensor:
        """Mean of a number over all processes."""

    @abstractmethod
    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""


class OneProcess(Processes):
    """Training in this process alone, on its accelerator if there is one."""

    rank, count = 0, 1

    def __init__(self, *, cpu: bool) -> None:
        there = None if cpu or not torch.accelerator.is_available() else torch.accelerator.current_accelerator()
        self.device = there or torch.device("cpu")

    def wait(self) -> None:
        return

    def main_first(self) -> AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def prepare(self, model: nn.Module) -> nn.Module:
        return model

    def without_exchange(self, network: nn.Module) -> AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def mean(self, value: Tensor) -> Tensor:
        return value

    def any(self, flag: bool) -> bool:
        return flag


class SeveralProcesses(Processes):
    """Training in processes that each hold the whole model and a share of every batch.

    Args:
        cpu: stay on the CPU.
        unused_parameters: whether a step may leave parameters without a gradient.
    """

    def __init__(self, *, cpu: bool, unused_parameters: bool) -> None:
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs

        options = DistributedDataParallelKwargs(find_unused_parameters=unused_parameters)
        self.accelerator = Accelerator(mixed_precision="no", cpu=cpu, kwargs_handlers=[options])
        self.rank, self.count = self.accelerator.process_index, self.accelerator.num_processes
        self.device = self.accelerator.device

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()

    def main_first(self) -> AbstractContextManager[Any]:
        return self.accelerator.main_process_first()

    def prepare(self, model: nn.Module) -> nn.Module:
        prepared: nn.Module = self.accelerator.prepare_model(model)
        return prepared

    def without_exchange(self, network: nn.Module) -> AbstractContextManager[Any]:
        return self.accelerator.no_sync(network)

    def mean(self, value: Tensor) -> Tensor:
        mean: Tensor = self.accelerator.reduce(value, reduction="mean")
        return mean

    def any(self, flag: bool) -> bool:
        return bool(self.accelerator.reduce(torch.tensor(float(flag), device=self.device), "sum") > 0)


def open_processes(*, cpu: bool = False, unused_parameters: bool = False) -> Processes:
    """The processes that this one belongs to, as whoever started them says in the environment."""
    if any(_count(os.environ.get(name)) > 1 for name in COUNTS):
        return SeveralProcesses(cpu=cpu, unused_parameters=unused_parameters)
    return OneProcess(cpu=cpu)


def _count(value: str | None) -> int:
    return int(value) if value is not None and value.isdigit() else 1


def check_sharing(recipe: AnyRecipe, processes: int) -> None:
    """Raises InputError for a batch that so many processes cannot share."""
    config = recipe.training
    if config.batch_size % (config.accumulation * processes):
        raise InputError(
            f"training.batch_size {config.batch_size} cannot be shared evenly by {processes} processes "
            f"with training.accumulation {config.accumulation}"
        )


def pieces_of(batch: tuple[Tensor, Tensor], processes: Processes, count: int) -> Sequence[tuple[Tensor, Tensor]]:
    """This process's share of inputs and targets, in so many equal pieces."""
    inputs, targets = (processes.share(part).chunk(count) for part in batch)
    return list(zip(inputs, targets, strict=True))
