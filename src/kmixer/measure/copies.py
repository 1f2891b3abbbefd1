"""What a copy memory is worth: how often the copied token comes next, and the loss with it and without.

By bucket of the length of the match, see `kmixer.layers.copy_memory`: a long match is right far more often.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from kmixer.errors import InputError
from kmixer.layers.copy_memory import BUCKET_STARTS, BUCKETS, bucket_of, nothing_seen
from kmixer.measure.evaluating import evaluating
from kmixer.models.causal_lm import CausalLM

# The buckets as a reader calls them: 0, 1, 2, 3, 4, 5-6, ..., over 32.
LENGTHS = (
    "0",
    *(str(a) if b == a + 1 else f"{a}-{b - 1}" for a, b in itertools.pairwise(BUCKET_STARTS)),
    f"over {BUCKET_STARTS[-1] - 1}",
)


@torch.no_grad()
def measure_copies(model: CausalLM, tokens: Int[Tensor, "b t"]) -> dict[str, Any]:
    """What the copies are worth to a model with a copy memory, dropout off, on windows of tokens (b, t).

    Returns:
        "layers", the numbers of those that take copies, from 0; and a list each, by "lengths" of the match: of
        "positions", how many there are (the last of a window is not among them, as nothing after it is known);
        "right", the part at which the copied token comes next; "loss", mean nats of what comes next; "loss_without",
        the same with the same weights when every position is told that nothing was seen before. None stands where
        there are no positions, and in "right" for length 0, which has no copy.

    Raises:
        InputError: a model without copy memory.
    """
    memory = model.copy_memory
    if memory is None:
        raise InputError("measure_copies: this model has no copy memory")
    tokens = tokens.to(memory.table.weight.device)
    seen, targets = tokens[:, :-1], tokens[:, 1:]
    with evaluating(model):
        copies, _ = memory.copies(seen)
        told = model(seen, targets=targets, copies=copies).losses
        untold = model(seen, targets=targets, copies=nothing_seen(seen)).losses
    assert told is not None and untold is not None
    buckets = bucket_of(copies.lengths).flatten()
    positions = torch.bincount(buckets, minlength=BUCKETS).tolist()

    def means(values: Tensor) -> list[float | None]:
        sums = torch.bincount(buckets, values.flatten().double(), BUCKETS).tolist()
        return [total / count if count else None for total, count in zip(sums, positions, strict=True)]

    return {
        "layers": list(memory.layers),
        "lengths": list(LENGTHS),
        "positions": positions,
        "right": [None, *means(copies.tokens == targets)[1:]],
        "loss": means(told),
        "loss_without": means(untold),
    }
