"""ListOps: worked examples by hand, the file format, and the distribution of what is drawn."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import pytest

from kmixer.data.listops import (
    SHORT,
    SYMBOLS,
    TOKEN_OF,
    VOCABULARY,
    ListOps,
    draw_trees,
    evaluate,
    source,
    symbols,
    write_listops,
)
from kmixer.errors import InputError

# (text without parentheses, value), worked by hand.
WORKED = [
    ("7", 7),
    ("[MAX 1 2 ]", 2),
    ("[MIN 4 9 0 3 ]", 0),
    ("[MED 3 8 1 6 ]", 4),  # middle 3 and 6: 4.5, rounded down
    ("[MED 5 1 9 ]", 5),
    ("[MED 2 3 ]", 2),
    ("[SM 9 9 5 ]", 3),
    ("[SM 5 5 ]", 0),
    ("[MAX 2 [MIN 7 4 ] 0 ]", 4),
    ("[SM [MAX 3 8 ] [MED 1 2 3 4 ] 7 ]", 7),  # 8 + 2 + 7
    ("[MIN [SM 8 7 ] [SM 6 5 ] ]", 1),  # 5 and 1
    ("[MED [MIN 9 8 ] [MAX 0 1 ] [SM 4 4 4 ] [MED 6 6 ] ]", 4),  # 8 1 2 6: middle 2 and 6
]


def parse(text: str) -> object:
    """A tree from its symbols; parentheses are read over."""
    words = iter(text.replace("(", " ").replace(")", " ").split())

    def read(word: str) -> object:
        if not word.startswith("["):
            return int(word)
        return (word, tuple(read(inner) for inner in iter(lambda: next(words), "]")))

    return read(next(words))


@pytest.mark.parametrize(("text", "value"), WORKED)
def test_worked_examples(text: str, value: int) -> None:
    tree = parse(text)
    assert evaluate(tree) == value  # type: ignore[arg-type]
    assert " ".join(symbols(tree)) == text  # type: ignore[arg-type]


def test_the_file_format_is_binary_from_the_left() -> None:
    assert source(("[MAX", (1, 2))) == "( ( ( [MAX 1 ) 2 ) ] )"
    assert source(("[SM", (("[MIN", (7, 4)), 0))) == "( ( ( [SM ( ( ( [MIN 7 ) 4 ) ] ) ) 0 ) ] )"
    assert parse(source(("[SM", (("[MIN", (7, 4)), 0)))) == ("[SM", (("[MIN", (7, 4)), 0))


def test_drawn_trees_are_distinct_in_bounds_and_repeatable() -> None:
    trees = list(itertools.islice(draw_trees(SHORT, 3), 300))
    assert trees == list(itertools.islice(draw_trees(SHORT, 3), 300))
    assert trees != list(itertools.islice(draw_trees(SHORT, 4), 300))
    assert len(set(trees)) == 300
    assert all(100 < len(symbols(tree)) <= 512 for tree in trees)
    assert {symbol for tree in trees for symbol in symbols(tree)} == set(SYMBOLS)
    assert sorted(TOKEN_OF.values()) == list(range(1, VOCABULARY))


def test_the_long_task_has_the_known_statistics() -> None:
    """Against an independent implementation over 4,000 trees: mean length 1,062, quartiles 724 and 1,346, classes."""
    trees = list(itertools.islice(draw_trees(ListOps(), 0), 1000))
    lengths = sorted(len(symbols(tree)) for tree in trees)
    assert lengths[0] > 500
    assert lengths[-1] < 2000
    assert sum(lengths) / 1000 == pytest.approx(1062, abs=45)  # the mean of 1,000 has a deviation of 12
    assert lengths[250] == pytest.approx(724, abs=45)
    assert lengths[750] == pytest.approx(1346, abs=80)
    shares = Counter(evaluate(tree) for tree in trees)
    expected = (0.172, 0.094, 0.075, 0.075, 0.091, 0.087, 0.078, 0.075, 0.077, 0.175)
    for value, share in enumerate(expected):
        assert shares[value] / 1000 == pytest.approx(share, abs=4 * (share * (1 - share) / 1000) ** 0.5)
    roots = Counter(tree[0] for tree in trees if isinstance(tree, tuple))
    assert sum(roots.values()) == 1000
    assert all(200 < count < 300 for count in roots.values())


def test_the_files_are_the_same_for_the_same_seed(tmp_path: Path) -> None:
    task = ListOps(train=20, validation=3, test=4, min_length=20, max_length=60)
    first, second, other = (write_listops(tmp_path / name, task, seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert [path.name for path in first] == ["basic_train.tsv", "basic_val.tsv", "basic_test.tsv"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert first[0].read_bytes() != other[0].read_bytes()
    lines = [line for path in first for line in path.read_text().splitlines()]
    assert lines[0] == "Source\tTarget"
    examples = [line.split("\t") for line in lines if line != "Source\tTarget"]
    assert len({text for text, _ in examples}) == 27
    assert all(evaluate(parse(text)) == int(target) for text, target in examples)  # type: ignore[arg-type]


def test_nothing_to_write_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="lengths above 50 and below 51"):
        write_listops(tmp_path, ListOps(min_length=50, max_length=51), 0)
