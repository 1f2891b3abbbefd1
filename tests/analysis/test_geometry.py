"""Perturbing text: tokens are replaced by draws from the training text, as many as asked for. Figures and records."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kmixer.analysis.geometry import Perturbing, replaced_tokens
from kmixer.analysis.panels.geometry import draw_geometry
from kmixer.analysis.panels.geometry_heads import draw_heads
from kmixer.errors import InputError
from kmixer.runs.lab_geometry import AblationRecord, GeometryRecord

COUNTS = torch.tensor([0, 1, 3, 6])


@settings(max_examples=25)
@given(st.floats(0.001, 1.0), st.integers(0, 1000))
def test_tokens_differ_in_the_share_that_the_frequencies_leave(rate: float, seed: int) -> None:
    clean = torch.ones(100, 40, dtype=torch.int64)
    changed = replaced_tokens(clean, COUNTS, rate, seed) != clean
    share, n = 0.9 * rate, clean.numel()  # a draw is the token itself in 1 of 10 cases
    assert abs(int(changed.sum()) - share * n) <= 5 * math.sqrt(n * share * (1 - share)) + 1


def test_draws_have_the_frequencies_of_the_counts() -> None:
    drawn = replaced_tokens(torch.zeros(200, 100, dtype=torch.int64), COUNTS, 1.0, 0)
    shares = torch.bincount(drawn.flatten(), minlength=4) / drawn.numel()
    assert shares.tolist() == pytest.approx([0.0, 0.1, 0.3, 0.6], abs=0.02)


def test_a_higher_rate_has_what_a_lower_one_has() -> None:
    clean = torch.zeros(50, 30, dtype=torch.int64)
    low, high = (replaced_tokens(clean, COUNTS, rate, 3) for rate in (0.1, 0.4))
    assert torch.equal(high[low != clean], low[low != clean])
    assert torch.equal(replaced_tokens(clean, COUNTS, 0.0, 3), clean)


def test_perturbations_have_names() -> None:
    assert Perturbing((0.005, 0.1), reverse=True).names == ["0.5 %", "10 %", "reversed"]


def moves(*distances: float, **changed: Any) -> dict[str, Any]:
    same = [0.1] * len(distances)
    lists = ("shared", "cka", "null", "null_band", "shared_null", "cka_band")
    return {"rank": 2.0, "distance": [*distances], **dict.fromkeys(lists, same), **changed}


def arm(head: str, codes: int, **changed: Any) -> dict[str, Any]:
    numbers = dict.fromkeys(("next_value", "repeating", "coding"), 0.01)
    names = {"system": "lorenz", "mixer": "any", "head": head, "codes": codes, "seed": 0, "parameters": 10}
    return {
        **names,
        **numbers,
        "trained": moves(0.1),
        "untrained": moves(0.2),
        "changed": [0.05],
        "decoded": {},
        **changed,
    }


ABOUT = {"name": "made", "trained": True, "positions": 8, "directions": 8}


def ablation(*arms: dict[str, Any]) -> dict[str, Any]:
    return {**ABOUT, "rates": [0.05], "learned": False, "arms": [*arms]}


def run(**changed: Any) -> dict[str, Any]:
    curve = {"name": "a$b", "width": 4, "changed": [0.1], "trained": moves(0.1), "distance_error": [0.01]}
    return {**ABOUT, "perturbations": ["5 %"], "curves": [{**curve, "untrained": [moves(0.2)], **changed}]}


def test_several_codebooks_have_axes_of_their_own() -> None:
    one = [arm("ce", 8), arm("mse", 8)]
    alone = draw_heads(AblationRecord.parse(ablation(*one), source="test"))
    several = draw_heads(AblationRecord.parse(ablation(*one, arm("ce", 32), arm("mse", 32)), source="test"))
    assert (len(alone.axes), len(several.axes)) == (2, 3)
    by_codes = [list(line.get_ydata()) for line in several.axes[2].lines]  # type: ignore[arg-type]
    assert by_codes == [[0.1, 0.1], [0.1, 0.1], [0.2, 0.2], [0.01, 0.01]]


def test_a_run_is_drawn_by_perturbation() -> None:
    figure = draw_geometry(GeometryRecord.parse(run(), source="test"))
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["5 %"]


@pytest.mark.parametrize(
    ("kind", "values", "why"),
    [
        (AblationRecord, ablation(), "arms"),
        (AblationRecord, ablation(arm("ce", 8, trained=moves(0.1, 0.2))), "another length than rates"),
        (AblationRecord, ablation(arm("ce", 8, trained=moves(1.5))), "distance"),
        (AblationRecord, ablation(arm("ce", 8, trained=moves(0.1, cka=[]))), "cka: it has another length"),
        (GeometryRecord, run(distance_error=[]), "another length than trained"),
        (GeometryRecord, run(untrained=[]), "untrained"),
        (GeometryRecord, {**run(), "perturbations": ["1 %", "5 %"]}, "another length than perturbations"),
    ],
)
def test_records_that_do_not_fit_are_one_line(kind: Any, values: dict[str, Any], why: str) -> None:
    with pytest.raises(InputError, match=why) as error:
        kind.parse(values, source="test")
    assert "\n" not in str(error.value)
