"""Every document by itself: its loss from its first token on, by third and by position."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from kmixer.errors import InputError
from kmixer.measure.evaluating import evaluating
from kmixer.measure.evaluation import STREAM_CHUNK, TOKENS_PER_BATCH, sequence_losses, stretches_of
from kmixer.models.causal_lm import CausalLM

# Tokens of a document that has thirds: one before the first loss, and a loss in every third.
SHORTEST = 4


@dataclass(frozen=True)
class DocumentsEvaluation:
    """Mean losses in nats per token over documents, each from a fresh state; its first token is not scored."""

    documents: int
    too_short: int  # documents of fewer than 4 tokens, which are left out
    tokens: int  # scored
    loss: float  # mean over all tokens
    thirds: list[float]  # mean over the tokens of every document's first, middle and last third
    stretches: list[float]  # mean loss of the positions 1, 2, 3-4, 5-8, ... of documents, as far as any goes
    # By document, in their order: tokens scored, and the means of its three thirds.
    lengths: list[int]
    losses: list[list[float]]

    def to_json(self) -> dict[str, Any]:
        return {"protocol": "documents", **asdict(self)}


@torch.no_grad()
def evaluate_documents(model: CausalLM, documents: Iterable[Tensor]) -> DocumentsEvaluation:
    """Mean cross-entropy of every document alone, in the model's own precision and with dropout off.

    Args:
        model: the model; one that adapts begins every document with nothing learned.
        documents: tokens (n,) of each.

    Raises:
        InputError: no document of 4 tokens or more, or one that is longer than the model's base kernel.
    """
    given = list(documents)
    kept = [tokens for tokens in given if len(tokens) >= SHORTEST]
    if not kept:
        raise InputError(f"documents: none of the {len(given)} has {SHORTEST} tokens or more")
    limit = model.config.max_positions
    if limit is not None and (longest := max(map(len, kept))) > limit + 1:
        raise InputError(f"documents: one has {longest} tokens; {model.config.limited_by} ends at position {limit}")
    with evaluating(model):
        losses = dict(_losses(model, kept))
    in_order = [losses[index] for index in range(len(kept))]
    thirds = [[part.mean().item() for part in _thirds(row)] for row in in_order]
    sums = torch.tensor([[float(part.sum()) for part in _thirds(row)] for row in in_order], dtype=torch.float64)
    sizes = torch.tensor([[len(part) for part in _thirds(row)] for row in in_order])
    return DocumentsEvaluation(
        documents=len(kept),
        too_short=len(given) - len(kept),
        tokens=int(sizes.sum()),
        loss=float(sums.sum() / sizes.sum()),
        thirds=(sums.sum(0) / sizes.sum(0)).tolist(),
        stretches=_stretches(in_order),
        lengths=[len(row) for row in in_order],
        losses=thirds,
    )


def _losses(model: CausalLM, documents: list[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """The losses of every document (n - 1,) in float64, with its number; those of like length together.

    A batch is filled up behind the ends of its rows, where causal models see nothing of it.
    """
    device = model.embedding.weight.device
    order = sorted(range(len(documents)), key=lambda index: -len(documents[index]))
    while order:
        longest = len(documents[order[0]])
        # A model with a base kernel over positions does not carry on, and its documents fit.
        if longest > STREAM_CHUNK and model.config.max_positions is None:
            index = order.pop(0)
            pieces = [block[0] for block in sequence_losses(model, documents[index])]
            yield index, torch.cat(pieces).double().cpu()
            continue
        chosen, order = order[: (count := max(1, TOKENS_PER_BATCH // longest))], order[count:]
        tokens = torch.nn.utils.rnn.pad_sequence([documents[index] for index in chosen], batch_first=True).to(device)
        losses = model(tokens[:, :-1], targets=tokens[:, 1:]).losses
        assert losses is not None
        for index, row in zip(chosen, losses.double().cpu(), strict=True):
            yield index, row[: len(documents[index]) - 1]


def _thirds(losses: Tensor) -> list[Tensor]:
    edges = [len(losses) * third // 3 for third in range(4)]
    return [losses[edges[third] : edges[third + 1]] for third in range(3)]


def _stretches(losses: list[Tensor]) -> list[float]:
    longest = max(map(len, losses))
    sums, counts = torch.zeros(longest, dtype=torch.float64), torch.zeros(longest, dtype=torch.float64)
    for row in losses:
        sums[: len(row)] += row
        counts[: len(row)] += 1
    # Weighted by how many documents reach a position.
    whole, known = stretches_of(sums), stretches_of(counts)
    return [total / count for total, count in zip(whole, known, strict=True)]
