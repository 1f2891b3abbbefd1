"""States at the ends of blocks of prompts that were read, for the prompts that begin alike.

A state is filed under a hash of all tokens before it, and has read exactly these. Least recently used go first.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import NamedTuple

from torch import Tensor

from kmixer.state import State, nbytes

BLOCK = 256  # tokens


class PrefixStates:
    """States of prefixes, up to so many bytes.

    Args:
        limit: bytes of all states; 0 keeps none.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._states: OrderedDict[bytes, _Kept] = OrderedDict()
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._states)

    def longest(self, hashes: list[bytes]) -> tuple[int, State]:
        """The most of these blocks whose state is kept, and it; 0 and None of none."""
        for count in range(len(hashes), 0, -1):
            kept = self._states.get(hashes[count - 1])
            if kept is not None:
                self._states.move_to_end(hashes[count - 1])
                return count, kept.state
        return 0, None

    def put(self, name: bytes, state: State) -> None:
        """Keep a state, of one row."""
        size = nbytes(state)
        if name in self._states or size > self._limit:
            return
        self._states[name] = _Kept(state, size)
        self.nbytes += size
        while self.nbytes > self._limit:
            _, oldest = self._states.popitem(last=False)
            self.nbytes -= oldest.nbytes


class _Kept(NamedTuple):
    state: State
    nbytes: int


def block_hashes(tokens: Tensor) -> list[bytes]:
    """Of the whole blocks of (n,) tokens: a hash of each and of all before it."""
    hashes: list[bytes] = []
    for block in tokens[: len(tokens) // BLOCK * BLOCK].split(BLOCK) if len(tokens) >= BLOCK else ():
        before = hashes[-1] if hashes else b""
        hashes.append(hashlib.blake2b(before + block.numpy().tobytes(), digest_size=16).digest())
    return hashes
