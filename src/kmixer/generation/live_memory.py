"""The copy memory of a prepared decoder: an automaton a row, alive between steps.

The automata are what `suffix_matches` would make of the remembered tokens again at every call. They lie in one int32
tensor, which the decoder's operations step in place.
"""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from kmixer import native
from kmixer.errors import InputError
from kmixer.ops.suffix_automaton import LONGEST_TEXT, SuffixState, remembers_from, suffix_matches

# Tokens that the automata of a new text have room for, at 132 bytes each; when they are full, room is doubled.
FIRST_CAPACITY = 512


class LiveMemory:
    """The automata (b, words) of a state of the copy memory, and what is needed to have that state again.

    Args:
        state: of any number of rows, at positions of their own; copied.
        memory: M, of the model that made the state.

    Raises InputError for a state that remembers too little.
    """

    def __init__(self, state: SuffixState, memory: int | None) -> None:
        self._memory = memory
        self.automata: Tensor
        self._position: Tensor
        self._room: float  # tokens until they may be full
        self._steps = 0  # counted since
        self._begin(state)

    @property
    def words(self) -> int:
        """Numbers of int32 a row."""
        return self.automata.shape[1]

    def count_step(self) -> bool:
        """To be called before every step; whether the automata lie elsewhere now, as they were full."""
        self._steps += 1
        if self._steps <= self._room:
            return False
        self._steps -= 1
        self._begin(self.state())
        self._steps = 1
        return True

    def make_room(self, tokens: int) -> bool:
        """To be called before so many are read at once; whether the automata lie elsewhere now."""
        if self._steps + tokens <= self._room:
            return False
        self._begin(self.state(), tokens)
        return True

    def count_kept(self, lengths: Tensor) -> None:
        """To be called after so many (b,) of the tokens that were read at once were remembered."""
        self._position = self._position + lengths
        self._room -= max(lengths.tolist(), default=0)

    def state(self) -> SuffixState:
        """The state after the steps that were counted, as `suffix_matches` gives it."""
        return self._state_of(slice(None))

    def _state_of(self, chosen: slice) -> SuffixState:
        position, automata = self._position[chosen] + self._steps, self.automata[chosen]
        counts = self._counts(position)
        text = torch.empty(len(position), int(counts.max()) if len(counts) else 0, dtype=torch.int64)
        native.call("suffix_text", automata, counts, text, *automata.shape, text.shape[1])
        return SuffixState(text[..., None], position)

    def put(self, row: int, state: SuffixState) -> None:
        """Let a row remember what a state of one row does; it has to have room, as it always has for M tokens."""
        _, _, (tokens, position) = suffix_matches(state.position.new_zeros(1, 0), state, self._memory)
        self._begin_rows(self.automata[row : row + 1], tokens, position)
        self._position[row] = int(position) - self._steps

    def row(self, row: int) -> SuffixState:
        """The state of one row."""
        return self._state_of(slice(row, row + 1))

    def move(self, source: int, target: int) -> None:
        """Let a row remember what another does."""
        self.automata[target].copy_(self.automata[source])
        self._position[target] = self._position[source]

    def _begin(self, state: SuffixState, more: int = 1) -> None:
        rows = len(state.position)
        # No new tokens: the state itself, checked, with as many tokens as are needed.
        _, _, (tokens, position) = suffix_matches(state.position.new_zeros(rows, 0), state, self._memory)
        width = tokens.shape[1]
        largest = LONGEST_TEXT if self._memory is None else self._memory
        capacity = min(largest, max(FIRST_CAPACITY, 2 * width, width + more))
        if capacity < width + more and capacity != self._memory:
            raise InputError(
                f"got {width:,} tokens to remember; allowed: fewer than {largest:,}; give a smaller memory"
            )
        self._room = math.inf if capacity == self._memory else capacity - width
        self.automata = torch.empty(rows, _words(capacity), dtype=torch.int32)
        self._capacity = capacity
        self._begin_rows(self.automata, tokens, position)
        self._position, self._steps = position.clone(), 0

    def _begin_rows(self, automata: Tensor, tokens: Tensor, position: Tensor) -> None:
        """Make automata of what rows remember."""
        text, counts = tokens[..., 0].contiguous(), self._counts(position)
        native.call("suffix_begin", automata, text, counts, *automata.shape, text.shape[1], self._capacity)

    def _counts(self, position: Tensor) -> Tensor:
        """How many tokens the rows remember before the token at this position."""
        return torch.tensor([p - remembers_from(p, self._memory) for p in position.tolist()], dtype=torch.int64)


def _words(capacity: int) -> int:
    library = native.kernels()
    assert library is not None
    words = library.suffix_automaton_words
    words.restype = ctypes.c_int64
    return int(words(ctypes.c_int64(capacity)))
