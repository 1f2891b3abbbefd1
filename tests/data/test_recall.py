"""The recall task is what it says, for every size."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kmixer.data.recall import FILLERS, Asked, Recall, make_recall, usual_task
from kmixer.errors import InputError


@st.composite
def tasks(draw: st.DrawFn) -> Recall:
    keys = draw(st.integers(1, 12))
    pairs, gap, more = draw(st.integers(1, keys)), draw(st.integers(0, 40)), draw(st.integers(0, 20))
    return Recall(pairs, keys, 4 * pairs + gap + more, gap)


def make(task: Recall, count: int = 5, seed: int = 0) -> Asked:
    return make_recall(task, count, torch.Generator().manual_seed(seed))


@given(tasks(), st.integers(0, 1 << 30))
def test_every_asked_key_was_shown_once_with_this_value(task: Recall, seed: int) -> None:
    """Read token by token: the shown part is pairs and filler, the gap is filler, the asked part every key once."""
    drawn = make(task, seed=seed)
    assert drawn.tokens.shape == (5, task.length)
    asked_from = task.length - 2 * task.pairs
    for row, places, values, distances in zip(*(part.tolist() for part in drawn), strict=True):
        shown: dict[int, tuple[int, int]] = {}
        position = 0
        while position < asked_from:
            if row[position] < FILLERS:
                position += 1
                continue
            key, value = row[position : position + 2]
            assert key - FILLERS < task.keys <= value - FILLERS
            assert value < task.vocabulary
            assert key not in shown
            shown[key] = value, position + 1
            position += 2
        assert len(shown) == task.pairs
        assert all(token < FILLERS for token in row[asked_from - task.gap : asked_from])
        assert sorted(row[asked_from::2]) == sorted(shown)
        assert places == list(range(asked_from, task.length, 2))
        for place, value, distance in zip(places, values, distances, strict=True):
            known, at = shown[row[place]]
            assert row[place + 1] == value == known
            assert distance == place - at >= task.nearest


@given(tasks())
def test_a_seed_gives_the_same_and_another_gap_the_same_pairs(task: Recall) -> None:
    first, again, farther = make(task), make(task), make(task.with_gap(task.gap + 16))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(farther.values, first.values)
    assert torch.equal(farther.distances, first.distances + 16)


def test_nothing_but_the_pair_tells_the_value() -> None:
    """Every value follows every key equally often, at every place: who does not remember has 1 / keys right."""
    task = Recall(4, 4, 24, gap=4)
    drawn = make(task, 8000)
    counts = torch.zeros(4, 4, 4)
    for place in range(4):
        keys = drawn.tokens[:, drawn.places[0, place]] - FILLERS
        counts[place] = torch.bincount(4 * keys + drawn.values[:, place] - FILLERS - 4, minlength=16).view(4, 4)
    assert task.chance == 0.25
    assert (counts / 8000 - 1 / 16).abs().max() < 0.02  # seven standard deviations
    assert set(drawn.distances.unique().tolist()) == set(range(5, 22, 2))


def test_the_usual_sizes() -> None:
    assert usual_task(8) == Recall(8, 16, 128)
    assert usual_task(64) == Recall(64, 64, 320)
    assert usual_task(192) == Recall(192, 256, 832)
    for pairs in (1, 2, 32, 33):
        assert usual_task(pairs).pairs == pairs


@pytest.mark.parametrize(
    ("pairs", "keys", "length", "gap"), [(0, 4, 99, 0), (5, 4, 99, 0), (4, 4, 79, 64), (1, 4, 9, -1)]
)
def test_what_does_not_fit_is_an_error(pairs: int, keys: int, length: int, gap: int) -> None:
    with pytest.raises(InputError, match=r"allowed: from 1|pairs need"):
        Recall(pairs, keys, length, gap)
    with pytest.raises(InputError, match="allowed: 1 or more"):
        usual_task(0)
