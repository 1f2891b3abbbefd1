"""How surprising every token of one sequence is to a model, in constant memory."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kmixer.data.tokenizers import Tokens
from kmixer.errors import InputError
from kmixer.models.causal_lm import CausalLM
from kmixer.state import State

CHUNK = 4096  # tokens of one forward pass
CONTEXT = 2048  # positions after which a state that grows with the text begins anew

Nats = npt.NDArray[np.float64]


class Surprise:
    """-ln p of the tokens of one sequence given all before them, in pieces of any size.

    The state is carried from the first token to the last. Where that cannot go on for ever (a base kernel that ends,
    attention without a window) it begins anew every `limit` positions and is given the last half of those first, so
    that every token is still predicted from `limit / 2` to `limit` tokens, or all.

    Args:
        model: in evaluation mode.
        window: the limit of a model that has none, too: one trained on short windows may not carry its state well
            past them.

    Raises:
        InputError: a window past the end of the model's base kernel.
    """

    def __init__(self, model: CausalLM, window: int | None = None) -> None:
        self._model = model
        end = model.config.max_positions
        if window is not None and end is not None and window > end:
            raise InputError(f"window {window}: {model.config.limited_by} ends at position {end}")
        self._limit = window or end or (CONTEXT if model.config.state_grows else None)
        self._state: State = model.initial_state(1)
        self._position = 0  # of the state
        self._seen = torch.zeros(0, dtype=torch.int64)  # the last half of what a limited state has seen
        self._last: Tensor | None = None  # the token (1,) before the next

    @torch.no_grad()
    def __call__(self, tokens: Tokens) -> Nats:
        """Nats of these tokens (n,); NaN for the first of the sequence, which nothing predicts."""
        if not len(tokens):
            return np.zeros(0)
        parts: list[Nats] = []
        targets = torch.from_numpy(tokens)
        if self._last is None:
            self._last, targets = targets[:1], targets[1:]
            parts.append(np.array([np.nan]))
        while len(targets):
            if self._position == self._limit:
                self._begin_anew()
            room = CHUNK if self._limit is None else min(CHUNK, self._limit - self._position)
            part, targets = targets[:room], targets[room:]
            inputs = torch.cat([self._last, part[:-1]])
            self._last = part[-1:]
            parts.append(self._read(inputs, part))
            if self._limit is not None:
                self._seen = torch.cat([self._seen, inputs])[-self._limit :]
        return np.concatenate(parts)

    def _begin_anew(self) -> None:
        self._state, self._position = self._model.initial_state(1), 0
        again = self._seen[len(self._seen) - len(self._seen) // 2 :]
        for piece in again.split(CHUNK):
            if len(piece):
                self._read(piece, piece)

    def _read(self, inputs: Tensor, targets: Tensor) -> Nats:
        device = self._model.embedding.weight.device
        output = self._model(inputs.to(device)[None], self._state, targets.to(device)[None])
        assert output.losses is not None
        self._state = output.state
        self._position += len(inputs)
        losses: Nats = output.losses[0].double().cpu().numpy()
        return losses
