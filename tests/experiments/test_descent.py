"""The shared loop of training steps."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from kmixer.experiments.descent import descend


class Few(NamedTuple):
    steps: int = 4
    learning_rate: float = 0.1
    weight_decay: float = 0.01


def test_every_step_is_one_of_adamw_with_a_gradient_of_norm_1_or_less() -> None:
    start, target = torch.tensor([3.0, -4.0]), torch.tensor([300.0, 0.0])
    parameter, by_hand = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([by_hand], lr=0.1, weight_decay=0.01)

    def loss() -> Tensor:
        return (parameter - target).square().sum()

    steps = []
    for step in descend(iter([parameter]), loss, Few()):
        steps.append(step)
        gradient = 2 * (by_hand.detach() - target)
        by_hand.grad = gradient / max(1.0, float(gradient.norm()))
        optimizer.step()
        torch.testing.assert_close(parameter, by_hand)
        assert parameter.grad is None
    assert steps == [1, 2, 3, 4]
    assert list(descend([parameter], loss, Few(steps=0))) == []
