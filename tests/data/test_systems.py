"""Series with a known state: they obey their equations, and a seed is the same series anywhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kmixer.data import systems
from kmixer.data.systems import SYSTEMS, make_series
from kmixer.errors import InputError


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_seed_is_a_series(system: str) -> None:
    first, again, other = (make_series(system, 5, 24, seed) for seed in (1, 1, 2))
    assert first.values.shape == (5, 25)
    assert first.values.dtype == torch.float64
    torch.testing.assert_close(first.values, again.values, rtol=0, atol=0)
    assert not torch.equal(first.values, other.values)
    assert torch.isfinite(first.values).all()
    if first.states:
        assert first.states["x"] is first.values or torch.equal(first.states["x"], first.values)


# The last values of a series, which hold on every machine up to how its sine rounds.
@pytest.mark.parametrize(
    ("system", "last"),
    [("oscillator", -0.0003399717656751085), ("lorenz", 7.8592241993005025), ("sines", 1.0245897188078785)],
)
def test_it_is_the_same_on_every_machine(system: str, last: float) -> None:
    assert make_series(system, 2, 64, 0).values[1, -1].item() == pytest.approx(last, rel=1e-7)


def test_an_oscillator_has_its_velocity_and_dies_out() -> None:
    series = make_series("oscillator", 200, 4096, 0)
    x, step = series.states["x"], systems.OSCILLATOR_TIME / 4096
    slope = (x[:, 2:] - x[:, :-2]) / (2 * step)
    torch.testing.assert_close(slope, series.states["velocity"][:, 1:-1], rtol=1e-3, atol=1e-3)
    assert float(x.abs().max()) <= 2
    assert float(x[:, -100:].abs().max()) <= 2 * 0.46  # exp(-0.2 * 4) = 0.449


def test_lorenz_obeys_its_equations_whatever_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    states = make_series("lorenz", 50, 64, 0).states
    assert all(float(value.abs().max()) < 100 for value in states.values())
    monkeypatch.setattr(systems, "SUBSTEPS", 32)
    finer = make_series("lorenz", 50, 64, 0).states
    for name, value in states.items():  # later on, chaos makes any difference large
        torch.testing.assert_close(value[:, :20], finer[name][:, :20], rtol=1e-3, atol=1e-3)


def test_a_step_of_lorenz_is_of_the_fourth_order() -> None:
    state = torch.tensor([[1.0], [2.0], [20.0]], dtype=torch.float64)

    def walked(steps: int) -> Tensor:
        at = state
        for _ in range(steps):
            at = systems._runge_kutta(at, 0.08 / steps)
        return at

    fine = walked(512)
    errors = [float((walked(steps) - fine).norm()) for steps in (4, 8)]
    assert 12 < errors[0] / errors[1] < 20


def test_sines_are_slow_enough_for_their_samples() -> None:
    values = make_series("sines", 100, 64, 0).values
    assert float(values.abs().max()) <= 5
    power = torch.fft.rfft(values[:, :-1] - values[:, :-1].mean(1, keepdim=True)).abs().square().mean(0)
    assert float(power[:10].sum() / power.sum()) > 0.9


def test_an_unknown_system_is_one_line() -> None:
    with pytest.raises(InputError, match="system: got 'pendulum'; allowed: oscillator, lorenz, sines"):
        make_series("pendulum", 1, 8, 0)
