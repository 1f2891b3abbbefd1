"""ListOps: nested lists of digits under MIN, MAX, MED and SM, to be evaluated to one digit.

The "basic" task of the Long Range Arena (Tay et al. 2021, after Nangia and Bowman 2018): a tree is an operator
with 2 to 10 arguments with probability 1/4 and a digit otherwise, a digit from depth 10 on; trees whose length
lies in bounds are kept, each once. MED is the median rounded down, SM the sum modulo 10.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from kmixer.errors import InputError
from kmixer.files import write_text

OPERATOR_PROBABILITY = 0.25
MAX_DEPTH = 10
MIN_ARGUMENTS, MAX_ARGUMENTS = 2, 10


def _median(values: list[int]) -> int:
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(values) % 2 else (ordered[half - 1] + ordered[half]) // 2


OPERATORS: dict[str, Callable[[list[int]], int]] = {
    "[MIN": min,
    "[MAX": max,
    "[MED": _median,
    "[SM": lambda values: sum(values) % 10,
}
NAMES = tuple(OPERATORS)
CLOSE = "]"
# What a model reads: 15 symbols, and 0 for padding.
SYMBOLS = (*map(str, range(10)), *NAMES, CLOSE)
TOKEN_OF = {symbol: index + 1 for index, symbol in enumerate(SYMBOLS)}
VOCABULARY = len(SYMBOLS) + 1

# A digit, or an operator and its arguments.
Tree = int | tuple[str, tuple["Tree", ...]]


@dataclass(frozen=True)
class ListOps:
    """How many examples, and how long: min_length < length < max_length, counting digits, operators and "]"."""

    train: int = 96_000
    validation: int = 2_000
    test: int = 2_000
    min_length: int = 500
    max_length: int = 2_000

    @property
    def parts(self) -> dict[str, int]:
        return {"train": self.train, "val": self.validation, "test": self.test}


# Lengths up to 512, for models that read so far.
SHORT = ListOps(min_length=100, max_length=513)


class _TooLongError(Exception):
    """The tree being drawn is longer than the bound."""


def evaluate(tree: Tree) -> int:
    """The digit a tree stands for."""
    if isinstance(tree, int):
        return tree
    name, arguments = tree
    return OPERATORS[name]([evaluate(argument) for argument in arguments])


def symbols(tree: Tree) -> list[str]:
    """What a model reads of a tree, in order; parentheses are left out."""
    if isinstance(tree, int):
        return [str(tree)]
    name, arguments = tree
    return [name, *(symbol for argument in arguments for symbol in symbols(argument)), CLOSE]


def source(tree: Tree) -> str:
    """A tree as the files have it, in binary parentheses from the left: `( ( ( [MAX 1 ) 2 ) ] )`."""
    if isinstance(tree, int):
        return str(tree)
    name, arguments = tree
    text = name
    for argument in arguments:
        text = f"( {text} {source(argument)} )"
    return f"( {text} {CLOSE} )"


def draw_trees(task: ListOps, seed: int) -> Iterator[Tree]:
    """Distinct trees of the right length, without end; the same for the same seed."""
    rng = random.Random(seed)
    seen: set[Tree] = set()
    while True:
        try:
            tree, length = _draw(rng, 1, task.max_length - 1)
        except _TooLongError:
            continue
        if length > task.min_length and tree not in seen:
            seen.add(tree)
            yield tree


def _draw(rng: random.Random, depth: int, room: int) -> tuple[Tree, int]:
    """A tree and its length. Raises _TooLongError as soon as it is longer than `room`."""
    if depth >= MAX_DEPTH or rng.random() >= OPERATOR_PROBABILITY:
        return rng.randrange(10), 1
    count = rng.randint(MIN_ARGUMENTS, MAX_ARGUMENTS)
    arguments, length = [], 2
    for _ in range(count):
        argument, added = _draw(rng, depth + 1, room - length)
        length += added
        if length > room:
            raise _TooLongError
        arguments.append(argument)
    return (rng.choice(NAMES), tuple(arguments)), length


def write_listops(folder: Path, task: ListOps, seed: int) -> list[Path]:
    """Write basic_train.tsv, basic_val.tsv and basic_test.tsv, columns Source and Target.

    Raises InputError for counts or lengths that leave nothing to write.
    """
    if min(task.parts.values()) < 1 or not 0 <= task.min_length < task.max_length - 1:
        raise InputError(
            f"listops: got {task.parts} examples and lengths above {task.min_length} and below {task.max_length}; "
            "allowed: 1 example or more of each part, and a length between the two"
        )
    trees = draw_trees(task, seed)
    paths = []
    for part, count in task.parts.items():
        lines = ["Source\tTarget"]
        for _ in range(count):
            tree = next(trees)
            lines.append(f"{source(tree)}\t{evaluate(tree)}")
        paths.append(folder / f"basic_{part}.tsv")
        write_text(paths[-1], "\n".join(lines) + "\n")
    return paths
