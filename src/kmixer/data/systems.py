"""Series of systems whose state is known: damped oscillators, sums of sines, Lorenz.

    oscillator   x = A exp(-g t) cos(w t + p), t in [0, 4)
    sines        x = sum of 3 to 5 sines with random phases, t in [0, 1)
    lorenz       x of x' = 10 (y - x), y' = x (28 - z) - y, z' = x y - 8 z / 3, a sample every 25 / 512

Everything is drawn uniformly and in float64, and Lorenz takes fixed steps, so that a seed is the same series anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kmixer.errors import check_choice

# Lorenz: time between samples, and Runge-Kutta steps in it; the error of a step is far below a sample's noise.
LORENZ_STEP, SUBSTEPS = 25 / 512, 8
OSCILLATOR_TIME = 4.0
MOST_SINES = 5
# Sines have a period of this many samples or more, and no frequency above 50.
SAMPLES_OF_A_PERIOD, HIGHEST_FREQUENCY = 8, 50.0


class Series(NamedTuple):
    """What is observed (n, t), and the state behind it by variable, the observed one among them; {} where none is."""

    values: Tensor
    states: dict[str, Tensor]


def make_series(system: str, count: int, length: int, seed: int) -> Series:
    """`count` series of length + 1 points: the last is what the last of `length` positions has to predict.

    Raises InputError for a system that there is not.
    """
    check_choice("system", system, SYSTEMS)
    return SYSTEMS[system](count, length, torch.Generator().manual_seed(seed))


def _oscillator(count: int, length: int, generator: torch.Generator) -> Series:
    amplitude = _uniform(generator, (count, 1), 0.5, 2)
    damping = _uniform(generator, (count, 1), 0.2, 2)
    frequency = _uniform(generator, (count, 1), 2, 20)
    phase = _uniform(generator, (count, 1), 0, 2 * math.pi)
    t = _times(length, OSCILLATOR_TIME)
    envelope, angle = amplitude * torch.exp(-damping * t), frequency * t + phase
    x = envelope * torch.cos(angle)
    return Series(x, {"x": x, "velocity": -damping * x - frequency * envelope * torch.sin(angle)})


def _sines(count: int, length: int, generator: torch.Generator) -> Series:
    highest = max(1.0, min(HIGHEST_FREQUENCY, length / SAMPLES_OF_A_PERIOD))
    shape = (count, MOST_SINES, 1)
    amplitude = _uniform(generator, shape, 0.1, 1)
    frequency = _uniform(generator, shape, 0.5, highest)
    phase = _uniform(generator, shape, 0, 2 * math.pi)
    number = 3 + (3 * torch.rand(count, 1, 1, generator=generator, dtype=torch.float64)).long()
    here = torch.arange(MOST_SINES)[:, None] < number
    x = (here * amplitude * torch.sin(2 * math.pi * frequency * _times(length, 1.0) + phase)).sum(1)
    return Series(x, {})


def _lorenz(count: int, length: int, generator: torch.Generator) -> Series:
    ranges = ((-15.0, 15.0), (-15.0, 15.0), (10.0, 40.0))
    state = torch.stack([_uniform(generator, (count,), low, high) for low, high in ranges])
    samples, step = [state], LORENZ_STEP / SUBSTEPS
    for _ in range(length):
        for _ in range(SUBSTEPS):
            state = _runge_kutta(state, step)
        samples.append(state)
    x, y, z = torch.stack(samples, dim=-1)
    return Series(x, {"x": x, "y": y, "z": z})


def _runge_kutta(state: Tensor, step: float) -> Tensor:
    """One step of the fourth order, of states (3, n)."""
    first = _lorenz_slope(state)
    second = _lorenz_slope(state + 0.5 * step * first)
    third = _lorenz_slope(state + 0.5 * step * second)
    fourth = _lorenz_slope(state + step * third)
    return state + step / 6 * (first + 2 * second + 2 * third + fourth)


def _lorenz_slope(state: Tensor) -> Tensor:
    x, y, z = state
    return torch.stack([10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z])


def _times(length: int, end: float) -> Tensor:
    return end * torch.arange(length + 1, dtype=torch.float64) / length


def _uniform(generator: torch.Generator, shape: tuple[int, ...], low: float, high: float) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)


SYSTEMS: dict[str, Callable[[int, int, torch.Generator], Series]] = {
    "oscillator": _oscillator,
    "lorenz": _lorenz,
    "sines": _sines,
}
