"""What a model predicts after contexts that several sources share, in windows drawn from each of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kmixer.errors import InputError
from kmixer.measure.ecology_sources import Followers, Shared, blocks_of
from kmixer.measure.evaluating import eagerly, evaluating
from kmixer.models.causal_lm import CausalLM

WINDOWS, BATCH = 256, 16  # of a source, and of a call
# Numbers of all laws of a source: 256 MB.
LARGEST = 1 << 26
SPLITS = 20


def model_followers(
    model: CausalLM,
    tokens: Sequence[Tensor],
    shared: Shared,
    blocks: int,
    window: int,
    took: Callable[[float], None] = lambda part: None,
) -> list[Followers]:
    """The model's laws of the next token at shared contexts, by source (n,).

    Windows lie end to end, spread over the text; laws are taken in their second half, so that every one has half a
    window of its source before it. `took` is told how many seconds the whole will take.

    Raises InputError for texts without a window, and for windows that the model has no positions for.
    """
    n, v = len(tokens[0]), model.vocabulary_size
    longest = min(n, model.config.max_positions or n)
    if not 2 <= window <= longest:
        raise InputError(f"--window: got {window}; allowed: 2 to {longest:,}, what model and texts have")
    half = window // 2
    count = min(WINDOWS, n // window, max(1, LARGEST // (half * v)))
    starts = torch.linspace(0, n - window, count, dtype=torch.float64).long()
    begun, calls = time.monotonic(), len(tokens) * len(starts.split(BATCH))
    followers: list[Followers] = []
    with evaluating(model), eagerly(model), torch.no_grad():
        for of_source, at in zip(tokens, shared.at, strict=True):
            laws, positions = [], []
            for part in starts.split(BATCH):
                windows = part[:, None] + torch.arange(window)
                logits = model(of_source[windows]).logits
                assert logits is not None
                laws.append(logits[:, window - half - 1 : -1].float().softmax(-1).flatten(0, 1))
                positions.append(windows[:, window - half :].flatten())
                if not followers and len(laws) == 1:
                    took((time.monotonic() - begun) * calls)
            position = torch.cat(positions)
            kept = at[position] >= 0
            chosen = position[kept]
            followers.append(Followers(at[chosen], blocks_of(n, blocks)[chosen], torch.cat(laws)[kept]))
    return followers
