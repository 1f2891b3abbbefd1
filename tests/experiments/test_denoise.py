"""The denoising benchmark learns, is repeatable, and is fair to its mixers."""

from __future__ import annotations

import math

import torch

from kmixer.data.denoising import Denoising, make_samples
from kmixer.experiments.denoise import BLOCKS, Budget, CausalConvolution, Denoiser, run_denoising
from tests.models.laws import assert_a_split_gives_the_whole, of_layer

TASK = Denoising()


def test_every_mixer_is_causal() -> None:
    tokens = make_samples(TASK, 2, 0).inputs
    changed = tokens.clone()
    changed[:, 40:] = (changed[:, 40:] + 1) % 16
    for name, make_block in BLOCKS.items():
        torch.manual_seed(0)
        model = Denoiser(make_block(TASK.length), TASK)
        torch.testing.assert_close(model(tokens)[:, :40], model(changed)[:, :40], msg=name)


def test_the_convolution_goes_on_from_its_state() -> None:
    torch.manual_seed(0)
    layer, x = CausalConvolution(4, 5).double(), torch.randn(2, 20, 4).double()
    start = layer.initial_state(2)
    assert_a_split_gives_the_whole(of_layer(layer, x), 20, [2, 3, 13], start=start)


def test_the_convolution_reaches_as_far_as_its_taps() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 20, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(CausalConvolution(4, 5)(x)[0][0, 12].sum(), x)
    assert gradient[0].abs().sum(1).nonzero().flatten().tolist() == [8, 9, 10, 11, 12]


def test_runs_learn() -> None:
    budget = Budget(steps=60, training=256, validation=128, evaluate_every=20)
    seen: list[tuple[str, int]] = []
    rows = run_denoising([0, 1], TASK, budget, lambda name, seed, best: seen.append((name, seed)))
    assert seen == [(name, seed) for name in BLOCKS for seed in (0, 1)]
    assert all(row.loss < math.log(16) for row in rows)
    assert {row.n for row in rows} == {2}


def test_runs_repeat() -> None:
    budget = Budget(steps=6, training=64, validation=32, evaluate_every=3)
    first, second = (run_denoising([0, 1], TASK, budget, lambda *_: None) for _ in range(2))
    assert first == second
