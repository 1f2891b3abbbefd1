"""The exact part of an ecology: excess, merges and the quotient by enumeration, and what mixes how."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kmixer.measure.ecology import (
    Numbers,
    binary_entropy,
    divergences,
    greedy_path,
    losses_and_complexities,
    losses_of,
    merge_gain,
    merge_thresholds,
    partitions,
    path_over_beta,
    quotient,
    rescued_at,
    set_losses,
    singles,
    states_in,
    task_distances,
)

STATES, CASES = 5, 40


def ecology(seed: int, w: int = STATES, contexts: int = 3, v: int = 4) -> tuple[Tensor, Tensor, Numbers]:
    """Laws, marginal and prior; every second one has two states of the same laws."""
    random = np.random.default_rng(seed)
    laws = random.dirichlet(np.full(v, 0.7), size=(w, contexts))
    laws[0, 0] = np.eye(v)[0]  # some outcomes never happen
    if seed % 2:
        laws[w - 1] = laws[1]
    prior: Numbers = random.dirichlet(np.full(w, 3.0))
    return torch.from_numpy(laws), torch.from_numpy(random.dirichlet(np.full(contexts, 2.0))), prior


def js(laws: list[list[float]], weights: list[float]) -> float:
    """By its definition: sum_w alpha_w KL(P_w | mean law), 0 log 0 = 0, in nats."""
    mean = [sum(a * law[y] for a, law in zip(weights, laws, strict=True)) for y in range(len(laws[0]))]
    terms = (
        a * p * math.log(p / m)
        for a, law in zip(weights, laws, strict=True)
        for p, m in zip(law, mean, strict=True)
        if p
    )
    return sum(terms)


def excess_by_definition(laws: Tensor, marginal: Tensor, prior: Numbers, cells: list[int]) -> float:
    total = 0.0
    for cell in cells:
        states = list(states_in(cell))
        mass = sum(prior[state] for state in states)
        weights = [float(prior[state] / mass) for state in states]
        for c, of_context in enumerate(marginal.tolist()):
            total += of_context * mass * js([laws[state, c].tolist() for state in states], weights)
    return total


def test_partitions_are_all_there_once() -> None:
    bell = [1, 2, 5, 15, 52, 203, 877, 4140]
    assert [len(partitions(w)) for w in range(1, 9)] == bell
    for row in partitions(4).tolist():
        cells = [cell for cell in row if cell]
        assert sum(cells) == 15 and all(a & b == 0 for a, b in itertools.combinations(cells, 2))
    assert len({frozenset(row) for row in partitions(6).tolist()}) == bell[5]


@pytest.mark.parametrize("seed", range(CASES))
def test_the_excess_is_a_mean_divergence_of_every_cell(seed: int) -> None:
    laws, marginal, prior = ecology(seed)
    loss, _ = losses_and_complexities(losses_of(laws, marginal, prior), prior)
    entropy = -torch.xlogy(laws, laws).sum(-1) @ marginal @ torch.from_numpy(prior)
    for cells, of_cells in zip(partitions(STATES).tolist(), loss.tolist(), strict=True):
        chosen = [cell for cell in cells if cell]
        assert of_cells - float(entropy) == pytest.approx(
            excess_by_definition(laws, marginal, prior, chosen), abs=1e-12
        )


@pytest.mark.parametrize("seed", range(CASES))
def test_merging_changes_the_objective_by_its_formula(seed: int) -> None:
    laws, marginal, prior = ecology(seed)
    losses = losses_of(laws, marginal, prior)
    loss, complexity = losses_and_complexities(losses, prior)
    known = {frozenset(cells) - {0}: index for index, cells in enumerate(partitions(STATES).tolist())}
    rows, pairs = [], []
    for cells, index in known.items():
        for pair in itertools.combinations(sorted(cells), 2):
            rows.append((known[cells - set(pair) | {sum(pair)}], index))
            pairs.append(pair)
    merged, split = np.array(rows).T
    chosen = np.array(pairs)
    for beta in (0.0, 0.1, 1.0):
        change = loss[merged] + beta * complexity[merged] - loss[split] - beta * complexity[split]
        np.testing.assert_allclose(merge_gain(losses, prior, chosen, beta), change, rtol=0, atol=1e-12)
    thresholds = merge_thresholds(losses, prior, chosen)
    gains = [merge_gain(losses, prior, pair[None], beta)[0] for pair, beta in zip(chosen, thresholds, strict=True)]
    np.testing.assert_allclose(gains, 0, atol=1e-12)


@pytest.mark.parametrize("seed", range(CASES))
def test_the_quotient_is_the_simplest_of_zero_excess_and_the_path_is_best_everywhere(seed: int) -> None:
    laws, marginal, prior = ecology(seed)
    losses = losses_of(laws, marginal, prior)
    loss, complexity = losses_and_complexities(losses, prior)
    path = path_over_beta(losses, prior)
    lossless = loss <= loss.min() + 1e-12
    simplest = lossless & (complexity <= complexity[lossless].min() + 1e-12)
    assert simplest.sum() == 1
    assert path[0].cells == quotient(laws, marginal)
    assert set(path[0].cells) == set(partitions(STATES)[simplest][0]) - {0}
    assert len(path[0].cells) == STATES - seed % 2
    assert path[-1].cells == ((1 << STATES) - 1,)
    assert all(a.beta <= b.beta and a.complexity > b.complexity for a, b in itertools.pairwise(path))
    for beta in np.linspace(0, 1.2 * path[-1].beta, 25):
        best = (loss + beta * complexity).min()
        here = [step for step in path if step.beta <= beta + 1e-12][-1]
        assert here.excess + loss.min() + beta * here.complexity == pytest.approx(best, abs=1e-11)


def test_the_path_is_no_sequence_of_single_merges() -> None:
    steps = [
        len(a.cells) - len(b.cells)
        for seed in range(CASES)
        for laws, marginal, prior in [ecology(seed)]
        for a, b in itertools.pairwise(path_over_beta(losses_of(laws, marginal, prior), prior))
    ]
    assert max(steps) > 1 and min(steps) <= 1


def test_greedy_merging_begins_and_ends_as_the_best_path() -> None:
    for seed in range(0, 10, 2):
        laws, marginal, prior = ecology(seed)
        losses = losses_of(laws, marginal, prior)
        exact, greedy = path_over_beta(losses, prior), greedy_path(losses, prior)
        assert [len(step.cells) for step in greedy] == [5, 4, 3, 2, 1]
        assert (greedy[0].cells, greedy[-1].cells) == (exact[0].cells, exact[-1].cells)
        assert greedy[-1].excess == pytest.approx(exact[-1].excess)
        assert greedy[1].beta == pytest.approx(
            merge_thresholds(losses, prior, np.array([[a, b] for a, b in itertools.combinations(singles(5), 2)])).min()
        )


@given(st.integers(0, 10_000), st.permutations(range(STATES)))
def test_permuting_states_permutes_what_comes_out(seed: int, order: list[int]) -> None:
    laws, marginal, prior = ecology(seed)
    path = path_over_beta(losses_of(laws, marginal, prior), prior)
    again = path_over_beta(losses_of(laws[order], marginal, prior[order]), prior[order])
    assert [step.beta for step in again] == pytest.approx([step.beta for step in path], abs=1e-10)
    for step, other in zip(path, again, strict=True):
        cells = {frozenset(order[state] for state in states_in(cell)) for cell in other.cells}
        assert cells == {frozenset(states_in(cell)) for cell in step.cells}


@given(st.integers(0, 10_000), st.integers(0, STATES - 1))
def test_a_copy_of_a_state_merges_at_zero_and_changes_no_quotient(seed: int, copied: int) -> None:
    laws, marginal, prior = ecology(seed)
    more, weights = torch.cat([laws, laws[copied : copied + 1]]), np.append(prior, prior[copied]) / (1 + prior[copied])
    losses = losses_of(more, marginal, weights)
    pair = np.array([[1 << copied, 1 << STATES]])
    assert divergences(losses, weights, pair) == pytest.approx(0, abs=1e-12)
    assert merge_thresholds(losses, weights, pair) == pytest.approx(0, abs=1e-12)
    cells = {frozenset(states_in(cell)) - {STATES} for cell in quotient(more, marginal)}
    assert cells == {frozenset(states_in(cell)) for cell in quotient(laws, marginal)}


def test_no_loss_is_less_with_more_cells_merged_into_one() -> None:
    """A cell of two states costs at least what they alone do, under any other marginal too."""
    for seed in range(200):
        laws, _, prior = ecology(2 * seed)
        other = torch.from_numpy(np.random.default_rng(seed).dirichlet(np.ones(3)))
        losses = losses_of(laws, other, prior)
        loss, _ = losses_and_complexities(losses, prior)
        bound = (prior[0] + prior[2]) * divergences(losses, prior, np.array([[1, 4]]))[0]
        merging = (partitions(STATES) & 5 == 5).any(1)
        assert (loss[merging] - loss.min() >= bound - 1e-12).all()


@given(st.integers(0, 10_000), st.floats(0, 1))
def test_task_distances_mix_with_their_ecologies(seed: int, alpha: float) -> None:
    laws, first, _ = ecology(seed)
    second = torch.from_numpy(np.random.default_rng(seed + 1).dirichlet(np.ones(3)))
    ends = [task_distances(laws, marginal) for marginal in (first, second)]
    mixed = task_distances(laws, (1 - alpha) * first + alpha * second)
    torch.testing.assert_close(mixed, (1 - alpha) * ends[0] + alpha * ends[1], rtol=0, atol=1e-12)
    zero, nu = (float(end[0, 1]) for end in ends)
    threshold = zero + 0.3 * (nu - zero)
    if nu > zero + 1e-9:
        share = rescued_at(threshold, zero, nu)
        at = task_distances(laws, (1 - share) * first + share * second)[0, 1]
        assert float(at) == pytest.approx(threshold, abs=1e-12)
    assert rescued_at(zero, zero, nu) == 0
    assert rescued_at(1.0, 0.5, 0.5) == math.inf


def test_divergences_are_in_nats_and_bounded_by_the_shares() -> None:
    laws = torch.eye(2, dtype=torch.float64)[:, None]
    prior = np.array([0.25, 0.75])
    losses = losses_of(laws, torch.ones(1), prior)
    pair = np.array([[1, 2]])
    assert divergences(losses, prior, pair) == pytest.approx(binary_entropy(np.array([0.25])))
    assert merge_thresholds(losses, prior, pair) == pytest.approx(1.0)
    assert set_losses(laws, torch.ones(1), prior, np.array([1, 2])).tolist() == [0, 0]
    assert task_distances(laws, torch.ones(1)).tolist() == [[0, 1], [1, 0]]
