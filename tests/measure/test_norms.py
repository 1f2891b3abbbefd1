"""What is measured of norms that are functions of every number alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kmixer.layers import Derf, DyT, RMSNorm
from kmixer.layers.norms import root_mean_square
from kmixer.measure.norms import PointwiseNorms


class Two(nn.Module):
    """Calls one norm twice, and another once."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.unused, self.rms = DyT(4, 0.5), Derf(4, 2.0), DyT(4), RMSNorm(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(self.rms(x)) + self.first(10 * x))


def test_inputs_are_counted_over_all_calls() -> None:
    model = Two()
    with torch.no_grad():
        assert model.second.shift is not None
        model.second.shift.fill_(0.25)
    x = torch.tensor([[0.1, -0.1, 0.5, -0.5]])
    recorder = PointwiseNorms(model)
    with torch.no_grad():
        model(x)
        recorder.remove()
        model(100 * x)  # no longer seen
        inputs = torch.stack([model.rms(x), 10 * x])
        then = model.first(inputs).sum(0)
    measured = recorder.measured()
    assert measured is not None
    assert measured["names"] == ["first", "second"]
    assert measured["alpha"] == [0.5, 2.0]
    assert measured["shift"] == [0.0, 0.25]
    assert measured["input"] == pytest.approx(
        [inputs.square().mean().sqrt().item(), then.square().mean().sqrt().item()]
    )
    assert measured["saturation"] == pytest.approx(
        [(0.5 * inputs).abs().gt(2).float().mean().item(), (2 * then + 0.25).abs().gt(2).float().mean().item()]
    )


def test_a_model_without_them_has_nothing_to_measure() -> None:
    recorder = PointwiseNorms(RMSNorm(4))
    recorder.remove()
    assert recorder.measured() is None
