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

from kmixer.generation.prepared import PreparedDecoder, can_prepare
from kmixer.models.causal_lm import CausalLM
from kmixer.state import State, batch_of


class Decoder(Protocol):
    """What the eager and the prepared decoder have in common."""

    def advance(self, tokens: Tensor) -> Tensor:
        """Logits (b, n, v) after each of the tokens (b, n) int64. Where it raises, the sequences stand as before."""
        ...

    def step(self, tokens: Tensor) -> Tensor:
        """The same for one token a row (b,): logits (b, v), which the next call may overwrite."""
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
        self.restore(state)

    @torch.no_grad()
    def advance(self, tokens: Tensor) -> Tensor:
        """Logits (b, n, v) after each of the tokens (b, n) int64. Where it raises, the sequences stand as before."""
        output = self._model(tokens, self._state)
        assert output.logits is not None
        self._state = output.state
        return output.logits

    def step(self, tokens: Tensor) -> Tensor:
        """The same for one token a row (b,): logits (b, v)."""
        return self.advance(tokens[:, None])[:, 0]

    def state(self) -> State:
        """Where the sequences stand; a snapshot."""
        return self._state

    def restore(self, state: State) -> None:
        """Stand where the state says. Raises InputError for one that is not of this model."""
        self._model.check_state(state, batch_of(state))
        self._state = state


def open_decoder(model: CausalLM, state: State) -> Decoder:
    """The fastest decoder that the model has: prepared where every part of it is known, else eager."""
    return PreparedDecoder(model, state) if can_prepare(model) else EagerDecoder(model, state)
