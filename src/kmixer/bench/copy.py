"""The copy memory: what its parts cost, on text and on the inputs that are hardest for it.

A section measures one part and returns its rows; `bench_copy` runs them all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kmixer.bench.copy_models import BATCHES, bench_decoding, bench_training
from kmixer.bench.measure import time_in_turn
from kmixer.errors import InputError
from kmixer.ops import suffix_matches

# Tokens of a row that are checked against the automaton in Python, which a run of one token makes quadratic, and the
# last ones, which are looked up in the text as it lies there: another algorithm, of whole rows.
CHECKED_FIRST = 3000
CHECKED_LAST = 8
BASELINE = "text"
# Of the model that is trained and decoded.
VOCABULARY = 65


@dataclass(frozen=True)
class CopySizes:
    """Tokens of the inputs; of decoding, those that were read before and those of a timed round."""

    windows: int = 64
    window: int = 2048
    row: int = 65_536
    hard: int = 100_000
    prompt: int = 4096
    steps: int = 100


def bench_copy(text: str, sizes: CopySizes, repeats: int) -> list[dict[str, Any]]:
    """Rows of every section: what was timed, its tokens, their rate, and its time beside that of the baseline.

    Raises:
        InputError: a text shorter than the inputs that are made of it.
    """
    return [row for section in SECTIONS for row in section(text, sizes, repeats)]


def bench_matches(text: str, sizes: CopySizes, repeats: int) -> list[dict[str, Any]]:
    """suffix_matches, timed in turn on all inputs, after it was checked on each."""
    cases = _texts(text, sizes) | _hard_inputs(text, sizes.hard)
    for name, tokens in cases.items():
        _check(name, tokens)
    timed = time_in_turn({name: partial(suffix_matches, tokens) for name, tokens in cases.items()}, repeats)
    rows = []
    for name, tokens in cases.items():
        seconds, relative = timed[name]["seconds"], timed[name]["relative"]
        rows.append(
            {
                "section": "matches",
                "what": name,
                "rows": len(tokens),
                "t": tokens.shape[1],
                "vocabulary": len(tokens.unique()),
                "seconds": seconds,
                "tokens_per_second": tokens.numel() / seconds,
                "token_relative_to_text": relative * cases[BASELINE].numel() / tokens.numel(),
            }
        )
    return rows


# Of the text, the sizes and the number of timed rounds; of every row, `section` and `what`.
SECTIONS: tuple[Callable[[str, CopySizes, int], list[dict[str, Any]]], ...] = (
    bench_matches,
    lambda text, sizes, repeats: bench_training(_ids(text) % VOCABULARY, repeats),
    lambda text, sizes, repeats: bench_decoding(_ids(text) % VOCABULARY, sizes.prompt, sizes.steps, repeats),
)


def _texts(text: str, sizes: CopySizes) -> dict[str, Tensor]:
    """The text by characters, in a row as long as the hard inputs, the baseline; in windows; in words, up to a row."""
    characters, words = _ids(text), _ids(text.split())
    decoded = max(BATCHES) * (sizes.prompt + sizes.steps)
    needed = max(sizes.windows * sizes.window, sizes.row, sizes.hard, decoded)
    if len(characters) < needed:
        raise InputError(
            f"bench copy: got a text of {len(characters):,} characters; allowed: {needed:,} or more; give a longer one"
        )
    windows = characters[: sizes.windows * sizes.window].view(sizes.windows, sizes.window)
    return {
        BASELINE: characters[None, : sizes.hard],
        "text, windows": windows,
        "text, one row": characters[None, : sizes.row],
        "words, one row": words[None, : sizes.row],
    }


def _ids(parts: str | list[str]) -> Tensor:
    """Numbers of the parts, in the order in which they first occur."""
    numbers: dict[str, int] = {}
    return torch.tensor([numbers.setdefault(part, len(numbers)) for part in parts])


def _hard_inputs(text: str, n: int) -> dict[str, Tensor]:
    """Inputs of n tokens with as many repeats, or as little order, as can be."""
    generator = torch.Generator().manual_seed(0)
    position = torch.arange(n)
    inputs = {
        "one token": torch.zeros(n, dtype=torch.int64),
        "two tokens in turn": position % 2,
        "Fibonacci word": torch.tensor(_fibonacci(n)),
        "de Bruijn word": torch.tensor(_de_bruijn(n)),
        "random of 2": torch.randint(2, (n,), generator=generator),
        "random of 50,000": torch.randint(50_000, (n,), generator=generator),
        "text 10 times": _ids(text)[: -(-n // 10)].repeat(10)[:n],
    }
    return {name: tokens[None] for name, tokens in inputs.items()}


def _fibonacci(n: int) -> list[int]:
    word, before = [0, 1], [0]
    while len(word) < n:
        word, before = word + before, word
    return word[:n]


def _de_bruijn(n: int) -> list[int]:
    """The first n tokens of a cycle of 2^k >= n that has every word of k bits once: the greedy one, ones first."""
    k = max(1, (n - 1).bit_length())
    seen, word, mask = bytearray(2**k), [0] * k, 2**k - 1
    seen[0], value = 1, 0
    while len(word) < n + k:
        bit = 0 if seen[value << 1 & mask | 1] else 1
        value = value << 1 & mask | bit
        seen[value] = 1
        word.append(bit)
    return word[k:]


def _check(name: str, tokens: Tensor) -> None:
    first, last = slice(None, CHECKED_FIRST), slice(-CHECKED_LAST, None)
    whole = suffix_matches(tokens)[:2]
    stepped = suffix_matches(tokens[:1, first], backend="python")[:2]
    _, _, state = suffix_matches(tokens[:, :-CHECKED_LAST])
    looked_up = suffix_matches(tokens[:, last], state)[:2]
    for x, beginning, end in zip(whole, stepped, looked_up, strict=True):
        if not (torch.equal(x[:1, first], beginning) and torch.equal(x[:, last], end)):
            raise RuntimeError(f"suffix_matches is wrong on {name}: not timed")
