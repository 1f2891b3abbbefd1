"""Statistics against values from tables."""

from __future__ import annotations

import pytest

from kmixer.experiments.statistics import paired_difference, student_quantile, summarize


@pytest.mark.parametrize(
    ("degrees", "quantile"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (30, 2.0423), (500, 1.9647)],
)
def test_students_quantile_is_that_of_the_tables(degrees: int, quantile: float) -> None:
    assert student_quantile(0.975, degrees) == pytest.approx(quantile, abs=1e-4)


def test_one_value_has_no_deviation() -> None:
    assert summarize([2.0]).deviation is None
    assert summarize([1.0, 3.0]).deviation == pytest.approx(2**0.5)


def test_a_difference_pairs_the_seeds_both_have() -> None:
    baseline = {1: 1.0, 2: 2.0, 3: 3.0}
    difference = paired_difference({2: 2.5, 3: 3.7, 4: 100.0}, baseline)
    assert difference is not None
    assert difference.n == 2
    assert difference.mean == pytest.approx(0.6)
    assert difference.interval is not None
    # 0.6 +- 12.7062 * sd / sqrt(2), sd of (0.5, 0.7)
    assert difference.interval[1] == pytest.approx(0.6 + 12.7062 * 0.1, abs=1e-4)
    alone = paired_difference({1: 1.5}, baseline)
    assert alone is not None
    assert alone.interval is None
    assert paired_difference({7: 1.0}, baseline) is None
