"""Laws that every language model with an explicit state keeps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def assert_a_split_gives_the_whole(model: Any, tokens: Tensor, cuts: list[int]) -> None:
    """Pieces (2, ...) cut at these positions, the state handed on, against all tokens (2, t) at once."""
    whole = model(tokens)
    state, pieces = model.initial_state(2), []
    for start, stop in zip([0, *cuts], [*cuts, tokens.shape[1]], strict=True):
        output = model(tokens[:, start:stop], state)
        state = output.state
        pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole.logits, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(state, whole.state, rtol=1e-9, atol=1e-9)
