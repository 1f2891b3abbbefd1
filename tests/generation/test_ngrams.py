"""N-gram counts: the probabilities of Witten and Bell by their definition, and the file that holds the counts."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kmixer.errors import InputError
from kmixer.generation.ngrams import LARGEST_ORDER, Ngrams, count_ngrams
from kmixer.tensor_files import load_tensors, save_tensors

texts = st.lists(st.integers(0, 4), min_size=1, max_size=60)


def defined(text: list[int], v: int, order: int, context: list[int]) -> list[float]:
    """P_o for the last o = order - 1 tokens of a context, from dictionaries."""
    if order == 0:
        return [1 / v] * v
    shorter = defined(text, v, order - 1, context)
    length = order - 1
    if length > len(context):
        return shorter
    wanted = context[len(context) - length :]
    followed = Counter(text[i] for i in range(length, len(text)) if text[i - length : i] == wanted)
    if not followed:
        return shorter
    used, whole = len(followed), sum(followed.values())
    return [(followed[y] + used * shorter[y]) / (whole + used) for y in range(v)]


@given(texts, st.integers(1, 5), st.lists(st.integers(0, 5), max_size=6))
def test_probabilities_are_those_of_witten_and_bell(text: list[int], order: int, context: list[int]) -> None:
    ngrams = count_ngrams(np.array(text), 6, order)
    row = ngrams.row(context)
    np.testing.assert_allclose(row, defined(text, 6, order, context), rtol=0, atol=1e-12)
    assert row.sum() == pytest.approx(1, abs=1e-12)
    assert (row > 0).all()


@given(texts, st.integers(1, 4))
def test_a_file_holds_the_counts(tmp_path_factory: pytest.TempPathFactory, text: list[int], order: int) -> None:
    path = tmp_path_factory.mktemp("ngram") / "counts.safetensors"
    ngrams = count_ngrams(torch.tensor(text, dtype=torch.uint8), 5, order, {"tokenizer": {"kind": "byte"}})
    ngrams.save(path)
    again = Ngrams.load(path)
    assert (again.order, again.vocabulary_size, again.about) == (order, 5, ngrams.about)
    assert again.tokenizer == {"kind": "byte"}
    for start in range(len(text)):
        assert np.array_equal(again.row(text[:start]), ngrams.row(text[:start]))
    content = path.read_bytes()
    again.save(path)
    assert path.read_bytes() == content


def test_keys_do_not_overflow_in_a_large_vocabulary() -> None:
    v = 1 << 20
    text = np.random.default_rng(0).integers(0, v, 300)
    ngrams = count_ngrams(np.concatenate([text, text]), v, 8)
    row = ngrams.row(text[100:107].tolist())
    assert row.argmax() == text[107]
    assert row[text[107]] > 0.9


@pytest.mark.parametrize("where", [40, 0.5, 0.9, -1])
def test_a_damaged_file_is_refused(tmp_path: Path, where: float) -> None:
    path = tmp_path / "counts.safetensors"
    count_ngrams(np.arange(200) % 7, 7, 3).save(path)
    content = bytearray(path.read_bytes())
    content[where if isinstance(where, int) else int(where * len(content))] ^= 0x10
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"counts\.safetensors"):
        Ngrams.load(path)
    path.write_bytes(bytes(content)[: len(content) // 2])
    with pytest.raises(InputError, match="damaged"):
        Ngrams.load(path)


@pytest.mark.parametrize(
    ("name", "index", "value"),
    [
        ("1.followers", 0, 7),
        ("1.followers", 0, -1),
        ("1.starts", 1, 10**6),
        ("1.starts", 1, 0),
        ("1.starts", -1, 10**6),
        ("1.counts", 3, 0),
        ("2.keys", 0, 10**12),
        ("2.keys", -1, 10**12),
        ("unigrams", 0, -5),
    ],
)
def test_counts_that_do_not_fit_together_are_refused(tmp_path: Path, name: str, index: int, value: int) -> None:
    """Files that were not damaged, but made by somebody else: no number may point outside."""
    path = tmp_path / "counts.safetensors"
    count_ngrams(np.arange(200) % 7, 7, 3).save(path)
    tensors, metadata = load_tensors(path)
    tensors[name][index] = value
    save_tensors(path, tensors, metadata)
    with pytest.raises(InputError, match=r"is damaged \(its counts do not fit together\)"):
        Ngrams.load(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "counts.safetensors"
    count_ngrams(np.arange(20) % 7, 7, 2).save(path)
    tensors, metadata = load_tensors(path)
    save_tensors(path, tensors, metadata | {"kind": "model"})
    with pytest.raises(InputError, match="holds no n-gram counts of this version; make them with kmixer ngram"):
        Ngrams.load(path)
    for wrong in ({"order": 3}, {"order": 0}, {"order": "x"}, {"about": None}, {"about": {"tokenizer": [1]}}):
        save_tensors(path, tensors, metadata | wrong)
        with pytest.raises(InputError, match="is damaged"):
            Ngrams.load(path)
    save_tensors(path, tensors | {"1.keys": tensors["1.keys"][None]}, metadata)
    with pytest.raises(InputError, match="it holds other arrays than counts of order 2"):
        Ngrams.load(path)


def test_texts_that_cannot_be_counted_are_named() -> None:
    with pytest.raises(InputError, match="order: got 0; allowed: 1 to 16"):
        count_ngrams(np.arange(3), 5, 0)
    with pytest.raises(InputError, match="order: got 17; allowed: 1 to 16"):
        count_ngrams(np.arange(3), 5, LARGEST_ORDER + 1)
    with pytest.raises(InputError, match=r"tokens: got shape \(0,\); allowed: \(n,\), one token or more"):
        count_ngrams(np.zeros(0, dtype=np.int64), 5, 2)
    with pytest.raises(InputError, match="tokens: got 0 to 5; allowed: 0 to 4"):
        count_ngrams(np.arange(6), 5, 2)
