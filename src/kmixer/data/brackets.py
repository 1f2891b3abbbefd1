"""Pairs of texts that differ in the order of their brackets alone: one balanced, its twin not.

The text is that of Python's own standard library, which every Python has: letters, blanks and round brackets.

    chunks      30 characters as they stand there, balanced, with two brackets or more; the twin has the brackets in
                another order, which is not balanced
    separated   42 characters without brackets, into which the 6 brackets of a balanced word are put, drawn alike from
                the 5 there are, at least 6 characters before each; the twin has one of the 15 other words at the same
                places

A counter of n-grams tells the twins of the first apart, by patterns such as "() ("; of the second no window of 6
characters holds two brackets, so that counting up to 5 characters of context tells nothing.
"""

from __future__ import annotations

import itertools
import re
import sysconfig
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from kmixer.errors import InputError

ALPHABET = " abcdefghijklmnopqrstuvwxyz()"
BLANK, OPEN, CLOSE = (ALPHABET.index(sign) for sign in " ()")
BEGIN = len(ALPHABET)  # the token before the first one
VOCABULARY = len(ALPHABET) + 1

CHUNK = 30
PLAIN, BETWEEN, DEPTH = 42, 6, 3  # of the separated ones: characters, those before a bracket, pairs of brackets

Codes = npt.NDArray[np.int64]


class Pairs(NamedTuple):
    """Tokens of texts and of their twins, each (n, t)."""

    balanced: Int[Tensor, "n t"]
    twins: Int[Tensor, "n t"]


def library_text() -> str:
    """The modules of Python's standard library, joined: 6 MB. Raises InputError where this Python has no sources."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    if not paths:
        raise InputError("this Python comes without the sources of its standard library; use one that has them")
    return "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in paths)


def chunk_pairs(text: str, count: int, seed: int) -> Pairs:
    """`count` pairs of chunks, the same for the same seed. Raises InputError where the text has fewer."""
    codes = _codes(text, brackets=True)
    chunks = codes[: len(codes) // CHUNK * CHUNK].reshape(-1, CHUNK)
    chunks = chunks[is_balanced(torch.from_numpy(chunks)).numpy() & (chunks == OPEN).any(1)]
    if len(chunks) < count:
        raise InputError(f"brackets: got {len(chunks):,} balanced chunks; {count:,} are needed, give more text")
    random = np.random.default_rng(seed)
    balanced = chunks[random.permutation(len(chunks))[:count]]
    twins = balanced.copy()
    left = np.arange(count)
    while len(left):
        for row in left:
            places = np.flatnonzero(twins[row] >= OPEN)
            twins[row, places] = random.permutation(twins[row, places])
        left = left[is_balanced(torch.from_numpy(twins[left])).numpy()]
    return Pairs(torch.from_numpy(balanced), torch.from_numpy(twins))


def separated_pairs(text: str, count: int, seed: int) -> Pairs:
    """`count` pairs of texts with separated brackets, the same for the same seed. Raises InputError for less text."""
    codes = _codes(text, brackets=False)
    plain = codes[: len(codes) // PLAIN * PLAIN].reshape(-1, PLAIN)
    if len(plain) < count:
        raise InputError(f"brackets: got {len(plain):,} pieces of {PLAIN} characters; {count:,} are needed")
    random = np.random.default_rng(seed)
    plain = plain[random.permutation(len(plain))[:count]]
    words = 2 * DEPTH
    free = PLAIN - words * BETWEEN
    # Where bars stand among stars: every way of spreading the free characters is as likely as another.
    orders = np.argsort(random.random((count, free + words)), axis=1)[:, :words]
    places = np.sort(orders, axis=1) + BETWEEN * np.arange(1, words + 1)
    arrangements = np.array([row for row in itertools.product((OPEN, CLOSE), repeat=words) if row.count(OPEN) == DEPTH])
    good = is_balanced(torch.from_numpy(arrangements)).numpy()
    balanced = np.empty((count, PLAIN + words), dtype=np.int64)
    letters = np.ones(balanced.shape, dtype=bool)
    np.put_along_axis(letters, places, False, axis=1)
    balanced[letters] = plain.ravel()
    twins = balanced.copy()
    for texts, kinds in ((balanced, arrangements[good]), (twins, arrangements[~good])):
        np.put_along_axis(texts, places, kinds[random.integers(len(kinds), size=count)], axis=1)
    return Pairs(torch.from_numpy(balanced), torch.from_numpy(twins))


def is_balanced(tokens: Int[Tensor, "n t"]) -> Bool[Tensor, " n"]:
    """Whether no bracket closes what was not opened, and none is left open."""
    depth = ((tokens == OPEN).long() - (tokens == CLOSE).long()).cumsum(1)
    return (depth >= 0).all(1) & (depth[:, -1] == 0)


def scrubbed(tokens: Tensor) -> Tensor:
    """The same with blanks in the place of brackets."""
    return torch.where(tokens >= OPEN, BLANK, tokens)


def _codes(text: str, *, brackets: bool) -> Codes:
    """Numbers in the alphabet, of the text in small letters; anything else is one blank."""
    allowed = "a-z()" if brackets else "a-z"
    plain = re.sub(f"[^{allowed}]+", " ", text.lower())
    table = np.zeros(128, dtype=np.int64)
    table[[ord(sign) for sign in ALPHABET]] = np.arange(len(ALPHABET))
    return table[np.frombuffer(plain.encode("ascii"), dtype=np.uint8)]
