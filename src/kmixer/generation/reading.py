"""Reading a prompt piece by piece, so that its length does not set the memory."""

from __future__ import annotations

import torch
from torch import Tensor

from kmixer.generation.decoder import Decoder, EagerDecoder
from kmixer.generation.prepared import PreparedDecoder
from kmixer.models.causal_lm import CausalLM
from kmixer.state import State

# Tokens that the model itself reads at once.
PREFILL_CHUNK = 2048
# Tokens that a prepared decoder reads at once: more are hardly faster, and the rest of a prompt is read as so many.
PIECE = 16


class PromptReader:
    """Reads sequences piece by piece.

    By a prepared decoder, a piece ends at a multiple of `PIECE` and is read in the same way whatever its length. Logits
    then depend on the tokens and on the position where reading began alone, bit for bit.

    Args:
        model: in evaluation mode.
        state: where the sequences stand; copied.
        prepared: whether a prepared decoder reads, or the model itself.
    """

    def __init__(self, model: CausalLM, state: State, *, prepared: bool) -> None:
        self._prepared = PreparedDecoder(model, state) if prepared else None
        self.decoder: Decoder = self._prepared or EagerDecoder(model, state)
        self._piece = PIECE if prepared else PREFILL_CHUNK

    def length(self, position: int, left: int) -> int:
        """How many of the tokens that are left the piece has which begins at a position."""
        return min(left, self._piece - position % self._piece)

    @torch.inference_mode()
    def read(self, tokens: Tensor) -> Tensor:
        """Logits (b, n, v) after each of the tokens (b, n) int64 of one piece."""
        if self._prepared is None:
            return self.decoder.advance(tokens)
        b, n = tokens.shape
        padded = torch.zeros(b, PIECE, dtype=torch.int64)
        padded[:, :n] = tokens  # logits do not depend on what follows
        logits = self._prepared.read(padded)
        self._prepared.commit(torch.full((b,), n))
        return logits[:, :n]
