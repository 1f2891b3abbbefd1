"""An exponential moving average of a model's weights, which is evaluated and kept in their place.

    average <- average + (1 - decay_s) (weights - average),   decay_s = min(decay, (1 + s) / (10 + s)) at step s

The early decays are smaller, so that the first weights are soon forgotten.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class WeightAverage:
    """The average of the parameters that train; `tensors` by parameter name."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = model, decay
        self.tensors = {name: parameter.detach().clone() for name, parameter in self._trained()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after step 1, 2, ..."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, parameter in self._trained():
            self.tensors[name].lerp_(parameter, 1 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within it, the model has the averaged weights."""
        parameters = dict(self._trained())
        weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        self._set(parameters, self.tensors)
        try:
            yield
        finally:
            self._set(parameters, weights)

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad]

    @staticmethod
    @torch.no_grad()
    def _set(parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
        for name, parameter in parameters.items():
            parameter.copy_(values[name])
