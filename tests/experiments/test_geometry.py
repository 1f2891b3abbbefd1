"""The ablation of heads is fair to them, learns, repeats, and sees no noise where there is none."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from kmixer.analysis.geometry import compare_heads
from kmixer.data.codebooks import uniform_codebook
from kmixer.data.systems import make_series
from kmixer.experiments.geometry import HEADS, Arms, Coded, Setting, build_arm, encoded, pooled, run_ablation
from kmixer.models.mixers.registry import BASELINE, CAUSAL_NAMES
from kmixer.runs.lab_geometry import HeadArm

SMALL = Setting(steps=4, length=16, width=16, training=200, least_inputs=64)
ARMS = Arms(["oscillator"], [BASELINE], [*HEADS], [16], [0, 1])


@pytest.mark.parametrize("mixer", CAUSAL_NAMES)
def test_both_heads_begin_with_the_same_encoder(mixer: str) -> None:
    (first, _), (second, _) = (build_arm(mixer, head, 16, 3, SMALL) for head in HEADS)
    other, _ = build_arm(mixer, "ce", 16, 4, SMALL)
    for (name, value), same in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(value, same), name
    assert not torch.equal(first.embedding.weight, other.embedding.weight)


def test_building_leaves_the_generator_of_the_process() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    build_arm(BASELINE, "ce", 8, 0, SMALL)
    assert torch.equal(torch.rand(1), expected)


@pytest.fixture(scope="module")
def measured() -> list[HeadArm]:
    return run_ablation(ARMS, SMALL, lambda arm: None)


def test_arms_repeat_and_share_what_they_began_with(measured: list[HeadArm]) -> None:
    seen: list[HeadArm] = []
    assert run_ablation(ARMS, SMALL, seen.append) == measured == seen
    assert [(arm.head, arm.seed) for arm in measured] == [(head, seed) for seed in (0, 1) for head in HEADS]
    assert ARMS.number == len(measured) == 4
    assert measured[0].untrained == measured[1].untrained != measured[2].untrained
    assert measured[0].trained != measured[1].trained
    assert set(measured[0].decoded) == {"x", "velocity"}


def test_heads_learn(measured: list[HeadArm]) -> None:
    longer = run_ablation(ARMS._replace(seeds=[0]), dataclasses.replace(SMALL, steps=60), lambda arm: None)
    for before, after in zip(measured, longer, strict=False):
        assert after.next_value < before.next_value


@pytest.fixture(scope="module")
def coded() -> Coded:
    series = make_series("lorenz", 400, 32, 1)
    setting = dataclasses.replace(SMALL, length=32, rates=(0.05, 1.0))
    return Coded(series, uniform_codebook(series.values, 32), setting)


def test_noise_changes_its_share_of_the_codes_at_most(coded: Coded) -> None:
    n = coded.tokens.numel()
    for rate, tokens, changed in zip(coded.setting.rates, coded.noisy, coded.changed, strict=True):
        share = float((tokens != coded.tokens).double().mean())
        assert share == changed
        # A step of noise of .1 leaves a bin of width 1 / 32 in 7 of 8 cases or more.
        assert 0.8 * rate <= share <= rate + 4 * math.sqrt(rate * (1 - rate) / n)


def test_what_is_told_beside_the_error(coded: Coded) -> None:
    steps = coded.scaled[:, 1:] - coded.scaled[:, :-1]
    assert coded.repeating == pytest.approx(float(steps.square().mean().sqrt()))
    assert 0 < coded.coding <= 0.5 / 32 + 1e-12
    assert coded.states["z"].shape == (400, 32 - coded.setting.decoded_from)


def test_no_noise_is_no_distance() -> None:
    series = make_series("sines", 100, 16, 1)
    none = Coded(series, uniform_codebook(series.values, 8), dataclasses.replace(SMALL, rates=(1e-12,)))
    moves, read = none.measure(build_arm(BASELINE, "mse", 8, 0, SMALL)[0])
    assert moves.distance[0] < 1e-7
    assert moves.cka[0] == pytest.approx(1)
    assert none.changed == [0.0]
    assert read == {}


def test_pools_and_modes() -> None:
    encoder, _ = build_arm(BASELINE, "ce", 8, 0, SMALL)
    tokens = torch.randint(8, (5, 16))
    hidden = encoded(encoder, tokens)
    assert encoder.training
    assert not hidden.requires_grad
    torch.testing.assert_close(pooled(hidden, "last"), hidden[:, -1].double())
    torch.testing.assert_close(pooled(hidden, "mean"), hidden.double().mean(1))
    torch.testing.assert_close(encoded(encoder, tokens[:2]), hidden[:2])


def test_inputs_are_enough_for_the_width() -> None:
    assert Setting().inputs == 1024
    assert Setting(width=128).inputs == 2560
    assert Setting(width=4, heads=2).directions == 4


def test_heads_are_compared_by_seed(measured: list[HeadArm]) -> None:
    (compared,) = compare_heads(measured, 1)
    ce, mse = ([arm for arm in measured if arm.head == head] for head in HEADS)
    ratios = [a.trained.distance[1] / b.trained.distance[1] for a, b in zip(ce, mse, strict=True)]
    assert compared["heads"]["distance"]["ratios"] == pytest.approx(ratios)
    low, high = compared["heads"]["shared"]["interval"]
    assert low <= compared["heads"]["shared"]["difference"] <= high
    before = sum(arm.trained.distance[1] - arm.untrained.distance[1] for arm in ce) / 2
    assert compared["from_untrained"]["ce"]["difference"] == pytest.approx(before)
    (alone,) = compare_heads(ce, 1)
    assert alone["heads"] is None
    assert [*alone["from_untrained"]] == ["ce"]
