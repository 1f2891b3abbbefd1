"""Overlap of tokens: what it is by definition, what leaves it unchanged, and the laws of attention at random."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kmixer.measure.homogenized import logistic, overlap_in_theory, simplex, simulate
from kmixer.measure.mean_field import predict
from kmixer.measure.overlap import Overlap, mean_overlap, measure_overlap
from kmixer.measure.signal import mean_cosine, stream_of
from kmixer.measure.signal_theory import theory_blocks
from kmixer.models import CausalLM, TransformerConfig


def streams(b: int, n: int, d: int, layers: int = 2, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(b, n, d, generator=generator, dtype=torch.float64) for _ in range(layers + 1)]


def assert_same(first: Overlap, second: Overlap) -> None:
    for name, value in first._asdict().items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(value, getattr(second, name), rtol=1e-10, atol=1e-12, equal_nan=True)
    for name, value in first.groups.items():
        torch.testing.assert_close(value, second.groups[name], rtol=1e-10, atol=1e-12)


@given(st.integers(1, 3), st.integers(2, 12), st.integers(1, 9))
def test_it_is_its_definition(b: int, n: int, d: int) -> None:
    hidden = streams(b, n, d)
    measured = measure_overlap(hidden)
    u = torch.nn.functional.normalize(hidden[1], dim=-1)
    pairs = [[float(row[i] @ row[j]) for i in range(n) for j in range(n) if i != j] for row in u]
    others = [
        float(u[a, i] @ u[c, j]) for a in range(b) for c in range(b) if a != c for i in range(n) for j in range(n)
    ]
    assert measured.overlap[1].item() == pytest.approx(sum(map(sum, pairs)) / (b * n * (n - 1)))
    assert measured.by_sequence[:, 1].tolist() == pytest.approx([sum(row) / len(row) for row in pairs])
    assert measured.with_diagonal[1].item() == pytest.approx(measured.overlap[1].item() * (n - 1) / n + 1 / n)
    deviations = [math.sqrt(sum((x - sum(row) / len(row)) ** 2 for x in row) / len(row)) for row in pairs]
    assert measured.spread[1].item() == pytest.approx(sum(deviations) / b)
    assert (
        math.isnan(measured.across[1])
        if b == 1
        else measured.across[1].item() == pytest.approx(sum(others) / len(others))
    )


def test_rotations_and_the_scale_of_a_token_change_nothing() -> None:
    hidden = streams(3, 70, 8)
    rotation = torch.linalg.qr(streams(1, 8, 8, seed=3)[0][0])[0]
    scales = torch.rand(3, 70, 1, dtype=torch.float64) + 0.1
    assert_same(measure_overlap(hidden), measure_overlap([scales * h @ rotation for h in hidden]))


def test_one_position_has_no_pair() -> None:
    measured = measure_overlap(streams(2, 1, 4))
    assert measured.overlap.isnan().all()
    torch.testing.assert_close(measured.with_diagonal, torch.ones(3, dtype=torch.float64))
    assert measured.groups == {}


def test_constant_tokens_are_alike_and_independent_ones_are_not() -> None:
    n, d = 40, 64
    assert measure_overlap([torch.ones(2, n, d)]).overlap.item() == pytest.approx(1)
    assert abs(measure_overlap(streams(4, n, d, 0)).overlap.item()) < 4 / (math.sqrt(d) * n)


def test_across_identical_sequences_it_is_that_with_the_diagonal() -> None:
    one = streams(1, 30, 6, 0)[0]
    measured = measure_overlap([one.expand(3, -1, -1)])
    torch.testing.assert_close(measured.across, measured.with_diagonal)
    assert measured.at_position.item() == pytest.approx(1)


def test_groups_are_the_excess_of_the_pairs_within_them() -> None:
    hidden = streams(3, 80, 5, 0)
    measured = measure_overlap(hidden)
    assert list(measured.groups) == ["1-8", "9-64", "65-80"]
    alone = measure_overlap([hidden[0][:, 8:64]])
    assert measured.groups["9-64"].item() == pytest.approx((alone.overlap - alone.across).item())


def test_the_mean_over_models() -> None:
    first, second = measure_overlap(streams(2, 9, 4)), measure_overlap(streams(2, 9, 4, seed=1))
    both = mean_overlap([first, second])
    torch.testing.assert_close(both.overlap, (first.overlap + second.overlap) / 2)
    torch.testing.assert_close(both.groups["1-8"], (first.groups["1-8"] + second.groups["1-8"]) / 2)
    assert both.positions == 9


def test_mean_field_theory_predicts_a_softmax_transformer() -> None:
    measured, predicted = [], []
    tokens = torch.arange(64)[None].expand(2, -1)
    for seed in range(6):
        torch.manual_seed(seed)
        values = {"width": 64, "layers": 6, "heads": 4}
        model = CausalLM(TransformerConfig.parse(values, source="test"), 64)
        hidden = stream_of(model, tokens)
        measured.append(measure_overlap(hidden).overlap)
        blocks = theory_blocks(model, 64)
        assert not isinstance(blocks, str)
        h = hidden[0].double()
        predicted.append(mean_cosine(predict(blocks, h @ h.mT / 64).covariances)[0])
    values, error = torch.stack(measured), torch.stack(measured).std(0) / math.sqrt(6)
    assert ((values.mean(0) - torch.stack(predicted).mean(0)).abs() <= 3 * error + 0.02).all()
    assert values.mean(0)[-1] > 0.2


def test_without_scores_overlap_is_logistic() -> None:
    start = simplex(16, 8, 32, 0.0, torch.Generator().manual_seed(0))
    times, values = simulate(start, 2.5, seed=1)
    error = values.std(1) / 4
    assert ((values.mean(1) - logistic(times, 1 / 8)).abs() <= 3 * error + 0.02).all()


@pytest.mark.parametrize("deviation", [0.0, 2.0, 8.0])
def test_a_simplex_follows_the_exact_drift(deviation: float) -> None:
    n, d, runs = 8, 16, 24
    start = simplex(runs, n, d, 0.1, torch.Generator().manual_seed(2))
    torch.testing.assert_close(start @ start.mT, (0.1 + 0.9 * torch.eye(n, dtype=torch.float64)).expand(runs, n, n))
    times, values = simulate(start, 1.5, deviation=deviation, seed=3)
    overlaps = (values * n - 1) / (n - 1)
    error = overlaps.std(1) / math.sqrt(runs)
    theory = overlap_in_theory(times[::10], 0.1, n, d, deviation)
    assert (overlaps.mean(1)[::10] - theory).abs().le(3 * error[::10] + 0.02).all()
    if deviation == 0:  # what is printed for wide tokens is the limit
        wide = overlap_in_theory(times[::10], 0.1, n, 100_000, 0.0)
        exact = (logistic(times[::10], 0.1 + 0.9 / n) * n - 1) / (n - 1)
        torch.testing.assert_close(wide, exact, rtol=1e-3, atol=1e-4)
