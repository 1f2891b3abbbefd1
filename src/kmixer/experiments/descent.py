"""The training loop of the small experiments: AdamW without a schedule, gradients clipped at 1."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn


class Schedule(Protocol):
    """What the setting of an experiment says of its training."""

    @property
    def steps(self) -> int: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...


def descend(parameters: Iterable[nn.Parameter], loss: Callable[[], Tensor], schedule: Schedule) -> Iterator[int]:
    """Train by the loss of one batch after the other, and give the number of every step once it is taken."""
    trained = list(parameters)
    optimizer = torch.optim.AdamW(trained, lr=schedule.learning_rate, weight_decay=schedule.weight_decay)
    for step in range(1, schedule.steps + 1):
        loss().backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield step
