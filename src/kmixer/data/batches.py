"""Batches of tokens: random windows for training, consecutive windows for evaluation."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Integer
from torch import Tensor


def random_windows(
    tokens: Integer[Tensor, " n"], window: int, batch_size: int, generator: torch.Generator
) -> tuple[Integer[Tensor, "b w"], Integer[Tensor, "b w"]]:
    """Inputs and targets of windows with independent uniform starts in 0..n-w-1, drawn on the tokens' device."""
    starts = torch.randint(len(tokens) - window, (batch_size, 1), generator=generator, device=tokens.device)
    both = tokens[starts + torch.arange(window + 1, device=tokens.device)].long()
    return both[:, :-1], both[:, 1:]


def consecutive_windows(
    tokens: Integer[Tensor, " n"], window: int, batch_size: int
) -> Iterator[tuple[Integer[Tensor, "b w"], Integer[Tensor, "b w"]]]:
    """Inputs and targets of the (n - 1) // w windows that do not overlap; the tail is dropped."""
    count = (len(tokens) - 1) // window
    inputs = tokens[: count * window].view(count, window)
    targets = tokens[1 : count * window + 1].view(count, window)
    for x, y in zip(inputs.split(batch_size), targets.split(batch_size), strict=True):
        yield x.long(), y.long()
