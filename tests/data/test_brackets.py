"""Pairs of texts that differ in the order of their brackets: balanced, and twins that are not."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from kmixer.data.brackets import (
    ALPHABET,
    BETWEEN,
    BLANK,
    CHUNK,
    CLOSE,
    OPEN,
    Pairs,
    chunk_pairs,
    is_balanced,
    library_text,
    scrubbed,
    separated_pairs,
)
from kmixer.errors import InputError

COUNT = 600


@pytest.fixture(scope="module")
def library() -> str:
    return library_text()[:1_000_000]


def depths(row: list[int]) -> list[int]:
    """By counting, bracket by bracket."""
    depth = [0]
    for token in row:
        depth.append(depth[-1] + (token == OPEN) - (token == CLOSE))
    return depth


def assert_twins(pairs: Pairs) -> None:
    for balanced, twin in zip(pairs.balanced.tolist(), pairs.twins.tolist(), strict=True):
        assert min(depths(balanced)) == 0 and depths(balanced)[-1] == 0
        assert min(depths(twin)) < 0 or depths(twin)[-1] != 0
        assert Counter(balanced) == Counter(twin)
        assert all(a == b or {a, b} == {OPEN, CLOSE} for a, b in zip(balanced, twin, strict=True))


def test_chunks_stand_in_the_library_and_their_twins_do_not_balance(library: str) -> None:
    pairs = chunk_pairs(library, COUNT, seed=0)
    assert pairs.balanced.shape == pairs.twins.shape == (COUNT, CHUNK)
    assert_twins(pairs)
    assert ((pairs.balanced >= OPEN).sum(1) >= 2).all()
    words = "".join(ALPHABET[token] for token in pairs.balanced[0].tolist())
    plain = "".join(character if character in ALPHABET else " " for character in library.lower())
    assert words in " ".join(plain.split(" ")) or words.split()[1] in plain


def test_separated_brackets_are_far_apart_and_every_word_is_as_likely(library: str) -> None:
    pairs = separated_pairs(library, COUNT, seed=0)
    assert_twins(pairs)
    places = (pairs.balanced >= OPEN).nonzero()[:, 1].view(COUNT, 6)
    assert (places.diff(dim=1) > BETWEEN).all() and (places[:, 0] >= BETWEEN).all()
    for texts, kinds in ((pairs.balanced, 5), (pairs.twins, 15)):
        counts = Counter(map(tuple, texts.gather(1, places).tolist()))
        assert len(counts) == kinds
        assert max(counts.values()) < 2 * COUNT / kinds
    assert places[:, -1].unique().numel() > 4  # the free characters are spread


def test_a_seed_gives_the_same_pairs(library: str) -> None:
    for make in (chunk_pairs, separated_pairs):
        first, again, other = (make(library, 50, seed) for seed in (1, 1, 2))
        assert all(map(torch.equal, first, again))
        assert not torch.equal(first.balanced, other.balanced)


def test_scrubbed_texts_hold_no_bracket() -> None:
    tokens = torch.tensor([[OPEN, 3, CLOSE, BLANK]])
    assert scrubbed(tokens).tolist() == [[BLANK, 3, BLANK, BLANK]]
    assert is_balanced(torch.tensor([[OPEN, CLOSE], [CLOSE, OPEN], [OPEN, OPEN], [3, 4]])).tolist() == [1, 0, 0, 1]


def test_too_little_text_is_one_line() -> None:
    for make in (chunk_pairs, separated_pairs):
        with pytest.raises(InputError, match="are needed"):
            make("f(x) and g(y), " * 30, 400, seed=0)


def test_a_python_without_sources_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setattr("kmixer.data.brackets.sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(InputError, match="without the sources"):
        library_text()
