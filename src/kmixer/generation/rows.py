"""Rows of one prepared step that come and go: row i is a sequence, whoever put it there.

    decoder.put(row, state)          a sequence takes a row; where it stands is copied
    logits = decoder.step(tokens)    one token for each of the first n rows
    decoder.move(source, target)     the row of the last takes the place of one that has ended
    decoder.state(row)               where one of them stands

Logits of a row do not depend, bit for bit, on the others, nor on how many there are.
"""

from __future__ import annotations

from typing import Protocol, cast

import torch
from torch import Tensor

from kmixer.errors import InputError
from kmixer.generation.decoder import EagerDecoder
from kmixer.generation.prepared import PreparedDecoder, parts_of, why_not_prepared
from kmixer.models.causal_lm import CausalLM, RememberingState, check_tokens
from kmixer.state import State, check_state

# Products of fewer rows, and of groups of fewer that many are cut into (three and four of seven where registers hold
# six), are sums in another order (native/few_rows.h).
FEWEST_ROWS, CUT_UNEVENLY = 4, 7


class Rows(Protocol):
    """Sequences that are decoded together, and come and go."""

    capacity: int

    def put(self, row: int, state: State) -> None: ...
    def state(self, row: int) -> State: ...
    def move(self, source: int, target: int) -> None: ...
    def step(self, tokens: Tensor) -> Tensor: ...


class RowDecoder:
    """A prepared step of at most `capacity` rows, on one thread.

    Args:
        model: a model for which `why_not_rows` has no objection.
        capacity: 1 or more.

    Raises InputError for another model.
    """

    def __init__(self, model: CausalLM, capacity: int) -> None:
        if problem := why_not_rows(model):
            raise InputError(f"rows that come and go are not for this model: {problem}; use EagerRow")
        self.capacity = capacity
        self._initial = model.initial_state(0)
        room = max(capacity, CUT_UNEVENLY + 1)
        self._decoder = PreparedDecoder(model, model.initial_state(room))
        self._tokens = torch.zeros(room, dtype=torch.int64)
        memory = self._decoder._memory
        if memory is not None and model.copy_memory is not None and model.copy_memory.memory is not None:
            memory.make_room(model.copy_memory.memory)  # all that they will ever need
            self._decoder._put_automata(memory)

    def step(self, tokens: Tensor) -> Tensor:
        """Logits (n, v) after one token (n,) int64 for each of the first n rows, valid until the next call."""
        decoder, n = self._decoder, len(tokens)
        stepped = n + 1 if n == CUT_UNEVENLY else max(n, FEWEST_ROWS)
        self._tokens[:n] = tokens
        self._tokens[n:stepped] = 0  # of rows that are nobody's
        decoder._decoding.rows = stepped
        if decoder._memory is not None:
            decoder._memory.count_step()
        if not decoder._library.decode_step(decoder._where, self._tokens.data_ptr(), 1, 1):
            check_tokens(tokens[:, None], decoder.vocabulary_size)
        return decoder._logits[:n]

    @torch.no_grad()
    def put(self, row: int, state: State) -> None:
        """Let a row stand where a state of one row says. Raises InputError for another model's."""
        check_state(state, self._initial, 1)
        memory = self._decoder._memory
        if memory is not None:
            state, remembered = cast("RememberingState", state)
            memory.put(row, remembered)
        for live, part in zip(self._decoder._live, parts_of(state), strict=True):
            live.check(part)
            live.stand_at(part, row)

    @torch.no_grad()
    def state(self, row: int) -> State:
        """Where a row stands; a snapshot of one row, as the model takes it."""
        memory, stack = self._decoder._memory, self._decoder._stack_state(slice(row, row + 1))
        return stack if memory is None else RememberingState(stack, memory.row(row))

    @torch.no_grad()
    def move(self, source: int, target: int) -> None:
        """Let a row stand where another stands."""
        for live in self._decoder._live:
            live.move(source, target)
        if self._decoder._memory is not None:
            self._decoder._memory.move(source, target)


class EagerRow:
    """One row of any model, called token by token."""

    capacity = 1

    def __init__(self, model: CausalLM) -> None:
        self._decoder = EagerDecoder(model, model.initial_state(1))

    def put(self, row: int, state: State) -> None:
        self._decoder.restore(state)

    def state(self, row: int) -> State:
        return self._decoder.state()

    def move(self, source: int, target: int) -> None:
        """There is but one."""

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        return self._decoder.step(tokens)


def why_not_rows(model: CausalLM) -> str | None:
    """Why a model's sequences cannot be rows of one prepared step; None where they can."""
    if model.copy_memory is not None and model.copy_memory.memory is None:
        return "its copy memory grows with the text"
    if model.config.state_grows:
        return "its attention keeps all that it has read"
    return why_not_prepared(model)
