"""The recall task: pairs of a key and a value, filler, and then every key once more, whose value is asked for.

    shown part | gap of filler | asked part
    k v . . k v ...    . . . .   k v k v ...

The shown part has `pairs` pairs at random, at even positions, with filler between them; the asked part has their keys
in another order. Only its values count: what else comes next is chance. Values are drawn anew for every sequence, so
that nothing but the shown pair tells them; two keys may have the same.

Filler is drawn from tokens of its own: one token alone would be written again and again, which is another task.

Tokens: the filler comes first, then the keys, then the values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from kmixer.errors import InputError

# Tokens that filler is drawn from.
FILLERS = 16
# Of more pairs the sequence would be long for its own sake.
MOST_WITH_FILLER = 32


@dataclass(frozen=True)
class Recall:
    """The task: `pairs` of `keys` keys in a sequence of `length` tokens, `gap` of them filler before the first key.

    Raises InputError where the pairs do not fit.
    """

    pairs: int
    keys: int  # as many values
    length: int
    gap: int = 64

    def __post_init__(self) -> None:
        if not 1 <= self.pairs <= self.keys:
            raise InputError(f"pairs: got {self.pairs} of {self.keys} keys; allowed: from 1 to as many as there are")
        least = 4 * self.pairs + self.gap
        if self.gap < 0 or self.length < least:
            raise InputError(f"length: got {self.length} with gap {self.gap}; {self.pairs} pairs need {least} or more")

    @property
    def vocabulary(self) -> int:
        """v: filler, keys and values."""
        return FILLERS + 2 * self.keys

    @property
    def chance(self) -> float:
        """The accuracy of who knows the values but not which it is."""
        return 1 / self.keys

    @property
    def nearest(self) -> int:
        """The fewest positions that may lie between a shown value and where it is asked for."""
        return self.gap + 1

    def with_gap(self, gap: int) -> Recall:
        """The same pairs with another gap, the shown part as long as it is."""
        return Recall(self.pairs, self.keys, self.length - self.gap + gap, gap)


def usual_task(pairs: int) -> Recall:
    """The sizes that are compared: 8 pairs of 16 keys in 128 tokens, 64 of 64 in 320, 192 of 256 in 832.

    Keys are a power of two, 16 or more; the shown part of up to 32 pairs is a third pairs, otherwise all.
    """
    if pairs < 1:
        raise InputError(f"pairs: got {pairs}; allowed: 1 or more")
    shown = 2 * pairs if pairs > MOST_WITH_FILLER else 6 * pairs
    return Recall(pairs, max(16, 1 << (pairs - 1).bit_length()), shown + 64 + 2 * pairs)


class Asked(NamedTuple):
    """Sequences, and what is asked of them; the keys of the asked part stand `pairs` times at every second position."""

    tokens: Int[Tensor, "n t"]
    places: Int[Tensor, "n p"]  # of the asked keys: the value of each comes next
    values: Int[Tensor, "n p"]  # that come next
    distances: Int[Tensor, "n p"]  # from the shown value to the place where it is asked for


def make_recall(task: Recall, count: int, generator: torch.Generator) -> Asked:
    """So many sequences, the same for the same state of the generator."""

    def order(size: int) -> Tensor:
        """The numbers below `size` in random order (n, size)."""
        return torch.rand(count, size, generator=generator).argsort(-1)

    pairs, asked_from = task.pairs, task.length - 2 * task.pairs
    slots = order((asked_from - task.gap) // 2)[:, :pairs]
    keys = FILLERS + order(task.keys)[:, :pairs]
    values = FILLERS + task.keys + torch.randint(task.keys, (count, pairs), generator=generator)
    asked = order(pairs)
    tokens = torch.randint(FILLERS, (count, task.length), generator=generator)
    tokens.scatter_(1, 2 * slots, keys)
    tokens.scatter_(1, 2 * slots + 1, values)
    places = (asked_from + 2 * torch.arange(pairs)).expand(count, pairs)
    answers = values.gather(1, asked)
    tokens.scatter_(1, places, keys.gather(1, asked))
    tokens.scatter_(1, places + 1, answers)
    return Asked(tokens, places, answers, places - (2 * slots + 1).gather(1, asked))
