"""A state that knows which tokens it has read, so that rows are found by their content.

A loop of generation hands over all tokens of all rows at every step. What the state has read of them is not read again;
where rows have changed places (beams), each is found by its tokens. A result thus depends on the tokens alone: a state
that does not belong to them costs the time to read them, and nothing else.
"""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

from torch import Tensor

from kmixer.state import State, rows


class RowRead(NamedTuple):
    """The tokens that a row has read: how many, and the hash of them."""

    length: int
    digest: Any  # a hashlib object, never changed

    def then(self, tokens: bytes, length: int) -> RowRead:
        """After more tokens."""
        digest = self.digest.copy()
        digest.update(tokens)
        return RowRead(self.length + length, digest)

    def key(self) -> tuple[int, bytes]:
        return self.length, self.digest.digest()


NOTHING_READ = RowRead(0, hashlib.blake2b(digest_size=16))


class ReadState:
    """Where the rows of a batch stand, and what each has read. Never changed.

    Args:
        state: of the model, as it takes and returns it.
        read: one a row.
    """

    def __init__(self, state: State, read: list[RowRead]) -> None:
        self.state, self.read = state, read

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Nothing: rows are found by their tokens. Older versions of transformers call it where rows change places."""


def after(tokens: Tensor, filled: list[int], read: list[RowRead] | None) -> list[RowRead]:
    """What rows have read after the tokens (b, n), of which the first filled[i] of row i are none."""
    numbers = tokens.cpu().numpy()
    before = [NOTHING_READ] * len(numbers) if read is None else read
    return [
        row.then(own[skipped:].tobytes(), len(own) - skipped)
        for own, skipped, row in zip(numbers, filled, before, strict=True)
    ]


def resumable(state: ReadState, tokens: Tensor, filled: list[int]) -> tuple[ReadState, int] | None:
    """The state with its rows as these tokens have them, and how many columns of the tokens it has read.

    None where a row begins with what no row of the state has read, or nothing is left to read.

    Args:
        tokens: (b, n), all of the rows so far, of which the first filled[i] of row i are none.
    """
    numbers = tokens.cpu().numpy()
    known = {row.key(): index for index, row in reversed(list(enumerate(state.read)))}
    for columns in {filled[0] + length for length, _ in known}:
        if columns < tokens.shape[1] and (sources := _sources(state, known, numbers[:, :columns], filled)) is not None:
            if sources == list(range(len(state.read))):
                return state, columns
            return ReadState(rows(state.state, sources), [state.read[source] for source in sources]), columns
    return None


def _sources(
    state: ReadState, known: dict[tuple[int, bytes], int], numbers: Any, filled: list[int]
) -> list[int] | None:
    """The row of the state that has read each of these rows; None where there is none for one of them."""
    sources = []
    for index, (own, skipped) in enumerate(zip(numbers, filled, strict=True)):
        key = NOTHING_READ.then(own[skipped:].tobytes(), len(own) - skipped).key()
        if key not in known:
            return None
        # Of rows that have read the same, its own: then nothing has to be copied.
        same = index < len(state.read) and state.read[index].key() == key
        sources.append(index if same else known[key])
    return sources
