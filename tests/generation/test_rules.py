"""Rules that decide token by token: the law of what is emitted, what they spend and how much they keep."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kmixer.generation.acceptance import acceptance, divergence, emitted, residual
from kmixer.generation.rules import Bounded, Cactus, Exact, Interp, Rule, Typical, chosen, spent
from tests.generation.rows import pairs, random_rows

EXACT = [Exact(), Cactus(0.0), Cactus(0.0, exact_gamma=True), Bounded(0.0), Interp(0.0)]
OTHERS = [Cactus(0.1), Cactus(1.0), Cactus(0.3, exact_gamma=True), Bounded(0.1), Typical(), Interp(0.5)]
amounts = st.floats(0.0, 3.0, allow_subnormal=False)
Pair = tuple[Tensor, Tensor]


def equal(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def for_every_token(rule: Rule, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """h (v, v) of every drafted token, the probability with which it is kept, and the normalised residuals."""
    v = len(p)
    h = rule.aim(p.expand(v, v), q.expand(v, v), torch.arange(v))
    mass = rule.mass(p.expand(v, v), q.expand(v, v), torch.arange(v))
    assert torch.equal(mass, h.diagonal())
    kept = torch.tensor([min(1.0, float(mass[n] / p[n])) if p[n] > 0 else 0.0 for n in range(v)], dtype=torch.float64)
    left = residual(p.expand(v, v), q.expand(v, v), h)
    return h, kept, left / left.sum(-1, keepdim=True)


@given(pairs())
@pytest.mark.parametrize("rule", [*EXACT, *OTHERS], ids=str)
def test_what_is_emitted_is_the_sum_over_drafted_tokens(rule: Rule, pair: Pair) -> None:
    p, q = pair
    h, kept, left = for_every_token(rule, p, q)
    assert torch.isfinite(h).all() and bool((h >= 0).all())
    equal(h.sum(-1), torch.ones_like(p))
    law = sum(
        p[n] * (kept[n] * torch.eye(len(p), dtype=torch.float64)[n] + (1 - kept[n]) * left[n]) for n in range(len(p))
    )
    equal(emitted(rule, p, q), law)
    equal(acceptance(rule, p, q), (p * kept).sum())


@given(pairs())
@pytest.mark.parametrize("rule", EXACT, ids=str)
def test_without_a_budget_the_law_is_the_verifiers(rule: Rule, pair: Pair) -> None:
    p, q = pair
    equal(emitted(rule, p, q), q)
    equal(acceptance(rule, p, q), torch.minimum(p, q).sum())


@given(pairs(), amounts)
def test_bounded_and_interp_emit_what_they_aim_at(pair: Pair, amount: float) -> None:
    p, q = pair
    for rule in (Bounded(amount), Interp(min(1.0, amount / 3))):
        h = rule.aim(p, q, torch.tensor(0))
        equal(emitted(rule, p, q), h)
        equal(acceptance(rule, p, q), torch.minimum(p, h).sum())


@given(pairs(), amounts, st.booleans())
def test_cactus_leaves_the_ratios_of_other_tokens(pair: Pair, delta: float, exact_gamma: bool) -> None:
    p, q = pair
    h, _, _ = for_every_token(Cactus(delta, exact_gamma), p, q)
    for n in range(len(p)):
        others = torch.arange(len(p)) != n
        equal(h[n, others] * q[others].sum(), q[others] * h[n, others].sum())
        assert h[n, n] >= q[n] and (q[n] > 0 or h[n, n] == 0)


@given(pairs(), amounts)
def test_bounded_is_the_nearest_to_the_draft_within_its_bound(pair: Pair, bound: float) -> None:
    """What says that no law within it is nearer: h / q is one number above p and one below, and the bound is met."""
    p, q = pair
    h = Bounded(bound).aim(p, q, torch.tensor(0))
    assert divergence(h, q) <= bound + 1e-12
    allowed = q > 1e-9
    ratio = (h / q)[allowed]
    for side in (h < p - 1e-9, h > p + 1e-9):
        same = ratio[side[allowed]]
        assert same.numel() == 0 or same.max() - same.min() <= 1e-6 * max(1.0, float(same.max()))
    nearer = bool(((h - p).abs() > 1e-9)[allowed].any())
    if nearer and bool((q > 0).all() | (p[q == 0] == 0).all()):
        assert divergence(h, q) == pytest.approx(bound, abs=1e-9)


def test_bounded_is_the_draft_where_that_is_near_enough() -> None:
    p, q = random_rows(200, 7, 0, 0.5), random_rows(200, 7, 1, 0.5)
    near = divergence(p, q) <= 0.3
    assert 20 < near.sum() < 200
    h = Bounded(0.3).aim(p, q, torch.zeros(200, dtype=torch.int64))
    equal(h[near], p[near])
    equal(divergence(h, q)[~near], torch.full_like(h[~near][:, 0], 0.3))


@given(st.floats(1e-9, 1 - 1e-9), st.floats(1e-6, 3.0))
def test_gamma_of_cactus(probability: float, delta: float) -> None:
    """Taylor's step keeps to delta up to 1/2, and spends ln(1 + 2 delta) where it reaches 1."""
    q = torch.tensor([probability, 1 - probability], dtype=torch.float64)
    taylor, exact = (Cactus(delta, exact).mass(q, q, torch.tensor(0)) for exact in (False, True))
    if taylor <= 0.5:
        assert spent(taylor, q[0]) <= delta * (1 + 1e-9)
        assert exact >= taylor * (1 - 1e-9)
    assert bool(taylor == 1) == (probability >= 1 / (1 + 2 * delta)) or abs(probability * (1 + 2 * delta) - 1) < 1e-9
    if exact < 1:
        assert spent(exact, q[0]) == pytest.approx(delta, rel=1e-6)
    else:
        assert -math.log(probability) <= delta * (1 + 1e-12)


def test_saturation_spends_more_than_delta() -> None:
    q = torch.tensor([1 / 3 + 1e-12], dtype=torch.float64)
    gamma = Cactus(1.0).mass(q[None], q[None], torch.tensor([0]))
    assert gamma.item() == 1
    assert spent(gamma, q).item() == pytest.approx(math.log(3))


@given(pairs(), amounts, st.booleans())
def test_spent_is_the_divergence_of_what_cactus_aims_at(pair: Pair, delta: float, exact_gamma: bool) -> None:
    p, q = pair
    h, _, _ = for_every_token(Cactus(delta, exact_gamma), p, q)
    rows = q.expand_as(h)
    equal(spent(h.diagonal(), q), divergence(h, rows))


def test_what_cactus_emits_is_nearer_than_the_draft_and_not_within_delta() -> None:
    p, q = random_rows(2000, 6, 2), random_rows(2000, 6, 3)
    worst = 0.0
    for delta in (0.01, 0.1, 0.5):
        for exact_gamma in (False, True):
            law = emitted(Cactus(delta, exact_gamma), p, q)
            assert bool((divergence(law, q) <= divergence(p, q) + 1e-12).all())
            worst = max(worst, float((divergence(law, q) / delta).max()))
    assert worst > 2  # delta is the budget of one drafted token: no bound on the output


def test_at_what_cactus_spends_bounded_keeps_at_least_as_much() -> None:
    p, q = random_rows(60, 5, 4), random_rows(60, 5, 5)
    for exact_gamma in (False, True):
        rule = Cactus(0.3, exact_gamma)
        output = divergence(emitted(rule, p, q), q)
        for row in range(len(p)):
            bounded = acceptance(Bounded(float(output[row])), p[row], q[row])
            assert bounded >= acceptance(rule, p[row], q[row]) - 1e-9


@given(pairs(), st.lists(amounts, min_size=2, max_size=2).map(sorted))
def test_acceptance_grows_with_the_budget(pair: Pair, budgets: list[float]) -> None:
    p, q = pair
    less, more = budgets
    for rule in (Cactus, lambda delta: Cactus(delta, exact_gamma=True), Bounded, lambda x: Interp(x / 3)):
        exact, low, high = (acceptance(r, p, q) for r in (Exact(), rule(less), rule(more)))
        assert exact - 1e-12 <= low <= high + 1e-12


@given(pairs())
def test_typical_keeps_what_is_likely_and_falls_on_the_likeliest(pair: Pair) -> None:
    p, q = pair
    rule = Typical(epsilon=0.2, alpha=0.5)
    least = min(0.2, 0.5 * math.exp(-sum(x * math.log(x) * -1 for x in q.tolist() if x > 0)))
    for n in range(len(q)):
        h = rule.aim(p, q, torch.tensor(n))
        assert int(h.argmax()) == (n if q[n] > least else int(q.argmax()))
        assert h.max() == 1


@given(pairs())
def test_what_the_verifiers_filters_remove_is_never_emitted(pair: Pair) -> None:
    p, q = pair
    for rule in (*EXACT, *(rule for rule in OTHERS if not isinstance(rule, Interp))):
        _, kept, left = for_every_token(rule, p, q)
        assert bool((kept[q == 0] == 0).all())
        assert bool((emitted(rule, p, q)[q == 0] == 0).all())
        assert torch.isfinite(left).all()


@given(st.integers(0, 4), st.integers(0, 4), amounts)
def test_one_hot_rows_are_kept_where_equal(p_token: int, q_token: int, amount: float) -> None:
    """Temperature 0: Cactus and the others are the exact rule."""
    p, q = torch.eye(5, dtype=torch.float64)[[p_token, q_token]]
    for rule in (Exact(), Cactus(amount), Cactus(amount, exact_gamma=True), Bounded(amount), Typical()):
        assert acceptance(rule, p, q) == float(p_token == q_token)
        assert torch.equal(emitted(rule, p, q), q)
        assert chosen(rule.aim(p, q, torch.tensor(p_token)), torch.tensor(p_token)) == float(p_token == q_token)
