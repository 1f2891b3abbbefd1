"""Reading rows that were filled up at their left: the filling never reaches the model.

Rows of one length are read together, and their states joined again: `kmixer.state` holds rows at different positions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kmixer.errors import InputError
from kmixer.generation.reading import PREFILL_CHUNK
from kmixer.models.causal_lm import CausalLM
from kmixer.state import State, in_order

# A target that does not count, as in torch's losses.
IGNORED = -100


class Rows(NamedTuple):
    """Rows of a batch that are filled up by as many tokens."""

    members: list[int]
    filled: int


def filled_at_the_left(mask: Tensor | None, tokens: Tensor, filling: int | None) -> list[int]:
    """How many tokens at the beginning of each row fill it up.

    Args:
        mask: (b, T), 0 where a row is filled up, 1 elsewhere, whose last columns are the tokens'; None is all 1.
        tokens: (b, n).
        filling: the token that fills rows up: at the beginning of a row it does so whatever the mask says. None, where
            rows may have ended: after them it stands for nothing.

    Raises InputError, one line, for any other mask, and for a row that is filled up altogether.
    """
    b, n = tokens.shape
    begun = filling is not None and n > 0 and bool((tokens[:, 0] == filling).any())
    if mask is None and not begun:
        return [0] * b
    if mask is None:
        mask = torch.ones_like(tokens)
    if mask.ndim != 2 or len(mask) != b or mask.shape[1] < n:
        raise InputError(f"attention_mask: got shape {tuple(mask.shape)}; allowed: ({b}, {n}), as the tokens")
    kept = mask[:, mask.shape[1] - n :] != 0
    if begun and filling is not None:
        kept = kept & (torch.eq(tokens, filling).cumprod(1) == 0)
    filled: list[int] = (~kept).sum(1).tolist()
    expected = torch.arange(n, device=mask.device) >= torch.tensor(filled, device=mask.device)[:, None]
    if not torch.equal(kept, expected):
        raise InputError(
            "attention_mask: got zeros inside or at the end of a row; allowed: at its beginning; "
            "set tokenizer.padding_side = 'left', its default here"
        )
    if n and n in filled:
        raise InputError(f"attention_mask: row {filled.index(n)} has no token; give every row one or more")
    return filled


def in_groups(filled: list[int]) -> list[Rows]:
    """The rows, those of one length together."""
    return [Rows([row for row, own in enumerate(filled) if own == one], one) for one in sorted(set(filled))]


def read(model: CausalLM, tokens: Tensor, filled: list[int], state: State, last: int = 0) -> tuple[Tensor, State]:
    """Logits (b, n, v), or of the last positions alone, and the state after the tokens.

    Args:
        tokens: (b, n), whose first filled[i] in row i are not read; their logits are 0.
        state: before the tokens; None is the beginning.
        last: of how many positions logits are wanted; 0 is all.
    """
    n = tokens.shape[1]
    wanted = n if last == 0 else min(last, n)
    logits, states, groups = [], [], in_groups(filled)
    for together, skipped in groups:
        own = tokens[:, skipped:] if len(groups) == 1 else tokens[together, skipped:]
        given, after = _read_whole(model, own, state, min(wanted, n - skipped))
        logits.append(F.pad(given, (0, 0, wanted - given.shape[1], 0)))
        states.append(after)
    if len(groups) == 1:
        return logits[0], states[0]
    members = [group.members for group in groups]
    return in_order(logits, members), in_order(states, members)


def _read_whole(model: CausalLM, tokens: Tensor, state: State, wanted: int) -> tuple[Tensor, State]:
    """Logits of the last positions, and the state, of rows without filling."""
    whole, n = [], tokens.shape[1]
    pieces = [tokens] if torch.is_grad_enabled() or n == 0 else tokens.split(PREFILL_CHUNK, dim=1)
    left = n
    for piece in pieces:
        output = model(piece, state)
        assert output.logits is not None
        state, left = output.state, left - piece.shape[1]
        if left < wanted:
            whole.append(output.logits)
    logits = whole[0] if len(whole) == 1 else torch.cat(whole, dim=1)
    return logits[:, logits.shape[1] - wanted :], state


def loss(model: CausalLM, tokens: Tensor, filled: list[int], labels: Tensor, items: Tensor | int | None) -> Tensor:
    """The mean cross-entropy of the labels that count, in nats; the token at t foretells the label at t + 1.

    Args:
        tokens, labels: (b, n); a label of -100 does not count.
        items: what the sum is divided by in the place of the number of labels that count.
    """
    total, count = torch.zeros((), device=tokens.device), 0
    for members, skipped in in_groups(filled):
        targets = labels[members, skipped + 1 :]
        counts = targets != IGNORED
        losses = model(tokens[members, skipped:-1], targets=targets.masked_fill(~counts, 0)).losses
        assert losses is not None
        total = total + losses.masked_fill(~counts, 0).sum()
        count += int(counts.sum())
    return total / (count if items is None else items)
