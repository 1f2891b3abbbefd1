"""Decoders: a model and where its sequences stand, as one thing that takes tokens and gives logits.

    logits = decoder.advance(tokens)      (b, n) to (b, n, v): after every token, the logits of the next
    logits = decoder.step(tokens)         (b,) to (b, v): the same for one token, without a copy
    kept = decoder.state()                where the sequences stand now; nothing changes it later
    decoder.restore(kept)                 back to there

Logits of all n positions are what a check of drafted tokens needs (speculative decoding). `restore` takes any state
of the model, of another number of rows too: rows of a batch are chosen, repeated, joined and put in order with
`kmixer.state`, also where they stand at different positions.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from kmixer.generation.prepared import PreparedDecoder, can_prepare, check_read
from kmixer.models.causal_lm import CausalLM
from kmixer.state import State, batch_of
from kmixer.trail import Trail


class Decoder(Protocol):
    """What the eager and the prepared decoder have in common."""

    def advance(self, tokens: Tensor) -> Tensor:
        """Logits (b, n, v) after each of the tokens (b, n) int64. Where it raises, the sequences stand as before."""
        ...

    def step(self, tokens: Tensor) -> Tensor:
        """The same for one token a row (b,): logits (b, v), which the next call may overwrite."""
        ...

    def read(self, tokens: Tensor) -> Tensor:
        """Logits (b, n, v) as `advance` gives them, while the sequences stand where they stood."""
        ...

    def commit(self, lengths: Tensor) -> None:
        """Stand after the first lengths[i] (b,) tokens that row i has read last, once for every `read`.

        Whatever moves the sequences, or another `read`, forgets what was read. Raises InputError where nothing is read.
        """
        ...

    def state(self) -> State:
        """Where the sequences stand; a snapshot."""
        ...

    def restore(self, state: State) -> None:
        """Stand where the state says. Raises InputError for one that is not of this model."""
        ...


class EagerDecoder:
    """The model itself, called on whatever tokens come: any model, any device, the only one for a long prompt.

    Args:
        model: in evaluation mode.
        state: where the sequences stand, as `model.initial_state(b)` or a call of it returned it.
    """

    def __init__(self, model: CausalLM, state: State) -> None:
        self._model, self._state = model, state
        self._trail: Trail | None = None
        self.restore(state)

    @torch.no_grad()
    def advance(self, tokens: Tensor) -> Tensor:
        """Logits (b, n, v) after each of the tokens (b, n) int64. Where it raises, the sequences stand as before."""
        output = self._model(tokens, self._state)
        assert output.logits is not None
        self._state, self._trail = output.state, None
        return output.logits

    def step(self, tokens: Tensor) -> Tensor:
        """The same for one token a row (b,): logits (b, v)."""
        return self.advance(tokens[:, None])[:, 0]

    @torch.no_grad()
    def read(self, tokens: Tensor) -> Tensor:
        """Logits (b, n, v) after each of the tokens; the sequences stay. InputError for a model without a trail."""
        output = self._model(tokens, self._state, trail=True)
        assert output.logits is not None
        self._trail = output.trail
        return output.logits

    @torch.no_grad()
    def commit(self, lengths: Tensor) -> None:
        """Stand after so many (b,) of the tokens that were read last."""
        self._state, self._trail = check_read(self._trail).at(lengths), None

    def state(self) -> State:
        """Where the sequences stand; a snapshot."""
        return self._state

    def restore(self, state: State) -> None:
        """Stand where the state says. Raises InputError for one that is not of this model."""
        self._model.check_state(state, batch_of(state))
        self._state, self._trail = state, None


def open_decoder(model: CausalLM, state: State) -> Decoder:
    """The fastest decoder that the model has: prepared where every part of it is known, else eager."""
    return PreparedDecoder(model, state) if can_prepare(model) else EagerDecoder(model, state)
