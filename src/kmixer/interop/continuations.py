"""How likely continuations of contexts, and whole documents, are to a model.

A context is read once for all its continuations, and what contexts begin with in common is read once: states are kept
by the tokens that they have read. They are kept at every BLOCK tokens and at the end of a context, wherever a request
comes from, so that a figure depends on its own text alone, to the last bit, not on what else was asked.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kmixer.data.tokenizers import Tokens
from kmixer.errors import InputError
from kmixer.generation.decoder import open_decoder
from kmixer.generation.kept_states import BLOCK, KeptStates, names_at
from kmixer.measure.evaluation import sequence_losses
from kmixer.models.causal_lm import CausalLM
from kmixer.state import State

KEPT_BYTES = 64 << 20  # of states


class Likelihood(NamedTuple):
    """Of a continuation."""

    log_probability: float  # nats, of all its tokens
    is_greedy: bool  # whether every token of it is the likeliest


class _Kept(NamedTuple):
    state: State
    logits: Tensor  # (v,) of the next token


class ContextStates:
    """States of a model by the tokens that they have read; the least recently used go first.

    Args:
        model: in evaluation mode; its weights are taken now.
        kept_bytes: of states.
    """

    def __init__(self, model: CausalLM, kept_bytes: int = KEPT_BYTES) -> None:
        self._initial = model.initial_state(1)
        self._decoder = open_decoder(model, self._initial)
        self._device = model.embedding.weight.device
        self._window = model.config.max_positions
        self._limited_by = model.config.limited_by
        self._kept: KeptStates[_Kept] = KeptStates(kept_bytes, at_least=1)  # of a context with many continuations
        self.tokens_read = 0
        self.contexts_cut = 0  # to the positions that the model has

    @torch.no_grad()
    def likelihood(self, context: Tokens, continuation: Tokens) -> Likelihood:
        """How likely a continuation (n,) is after a context of one token or more.

        Of a model that ends at a position, the first tokens of a long context are left out. Raises InputError for an
        empty context, and for a continuation with more tokens than such a model has positions.
        """
        if not len(context):
            raise InputError("context: got no token; give one or more")
        if not len(continuation):
            return Likelihood(0.0, True)
        state, logits = self._after(self._cut(context, len(continuation)))
        rows = logits[None]
        if len(continuation) > 1:
            self._decoder.restore(state)
            rows = torch.cat([rows, self._advance(continuation[:-1])])
        chosen = torch.from_numpy(continuation).to(rows.device)
        log_probabilities = rows.double().log_softmax(-1).gather(1, chosen[:, None])
        return Likelihood(float(log_probabilities.sum()), bool((rows.argmax(-1) == chosen).all()))

    def _cut(self, context: Tokens, continuation: int) -> Tokens:
        if self._window is None:
            return context
        room = self._window - continuation + 1  # the last token of a continuation is not read
        if room < 1:
            raise InputError(
                f"a continuation of {continuation:,} tokens: {self._limited_by} ends at position {self._window:,}"
            )
        self.contexts_cut += len(context) > room
        return context[-room:]

    def _after(self, context: Tokens) -> _Kept:
        """The state after a context, from that of the longest part of it which was read before."""
        ends = [*range(BLOCK, len(context), BLOCK), len(context)]
        names = names_at(context, ends)
        known, kept = self._kept.longest(names)
        if known < len(ends):
            self._decoder.restore(self._initial if kept is None else kept.state)
        begin = ends[known - 1] if known else 0
        for name, end in zip(names[known:], ends[known:], strict=True):
            logits = self._advance(context[begin:end])[-1].clone()
            kept, begin = _Kept(self._decoder.state(), logits), end
            self._kept.put(name, kept)
        assert kept is not None
        return kept

    def _advance(self, tokens: Tokens) -> Tensor:
        """Logits (n, v) after each of the tokens."""
        self.tokens_read += len(tokens)
        return self._decoder.advance(torch.from_numpy(tokens).to(self._device)[None])[0]


@torch.no_grad()
def document_nats(model: CausalLM, prefix: Tokens, tokens: Tokens) -> float:
    """-ln p of a whole document (n,) after a prefix of one token or more, in a fresh state.

    The state is carried from the first token to the last. A model that ends at a position reads windows of as many
    tokens as it has positions; they do not overlap in what they predict, and the last has all the context that fits.
    """
    window = model.config.max_positions
    whole = torch.from_numpy(np.concatenate([prefix, tokens]))
    if not len(prefix):
        raise InputError("prefix: got no token; give one or more")
    if not len(tokens):
        return 0.0
    if window is None:
        losses = torch.cat([block[0].double() for block in sequence_losses(model, whole)])
        return float(losses[len(prefix) - 1 :].sum())
    device = model.embedding.weight.device
    nats, begin = 0.0, len(prefix)
    while begin < len(whole):
        end = min(begin + window, len(whole))
        seen = whole[max(0, end - 1 - window) : end].to(device)[None]
        of_window = model(seen[:, :-1], targets=seen[:, 1:]).losses
        assert of_window is not None
        nats += float(of_window[0, begin - end :].double().sum())
        begin = end
    return nats
