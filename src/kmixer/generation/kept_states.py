"""States at places of texts that were read, for the texts that begin alike.

A state is filed under a hash of all tokens before it, and has read exactly these. Least recently used go first.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import OrderedDict
from collections.abc import Sequence
from typing import Generic, TypeVar

from kmixer.data.tokenizers import Tokens
from kmixer.state import State, nbytes

BLOCK = 256  # tokens from one state that is kept to the next

Kept = TypeVar("Kept", bound=State)


class KeptStates(Generic[Kept]):
    """States, or trees of a state and more, up to so many bytes.

    Args:
        limit: bytes of all.
        at_least: how many of the newest stay, whatever their size.
    """

    def __init__(self, limit: int, *, at_least: int = 0) -> None:
        self._limit, self._at_least = limit, at_least
        self._kept: OrderedDict[bytes, tuple[Kept, int]] = OrderedDict()
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def longest(self, names: Sequence[bytes]) -> tuple[int, Kept | None]:
        """After how many of these names, of a text from its beginning on, the last state is kept, and it; 0 of none."""
        for count in range(len(names), 0, -1):
            if names[count - 1] in self._kept:
                self._kept.move_to_end(names[count - 1])
                return count, self._kept[names[count - 1]][0]
        return 0, None

    def put(self, name: bytes, kept: Kept) -> None:
        """Keep it, where it fits and is not there yet."""
        size = nbytes(kept)
        if name in self._kept or (size > self._limit and not self._at_least):
            return
        self._kept[name] = kept, size
        self.nbytes += size
        while self.nbytes > self._limit and len(self._kept) > self._at_least:
            self.nbytes -= self._kept.popitem(last=False)[1][1]


def names_at(tokens: Tokens, ends: Sequence[int]) -> list[bytes]:
    """What the tokens (n,) before every end are known by; ends rise."""
    digest, names = hashlib.blake2b(digest_size=16), []
    for begin, end in itertools.pairwise((0, *ends)):
        digest.update(tokens[begin:end].tobytes())
        names.append(digest.digest())
    return names


def names_of_blocks(tokens: Tokens) -> list[bytes]:
    """The names at the ends of all whole blocks."""
    return names_at(tokens, range(BLOCK, len(tokens) + 1, BLOCK))
