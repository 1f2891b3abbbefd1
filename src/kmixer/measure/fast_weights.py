"""What fast weights learned and what it was worth: how far they moved by layer, the loss with adapting and without."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from kmixer.errors import InputError
from kmixer.layers.adapting import adapting, relative_moves
from kmixer.measure.evaluating import evaluating
from kmixer.measure.evaluation import stretch_edges, stretches_of
from kmixer.models.causal_lm import CausalLM
from kmixer.state import State

# Places along a stream of which the moves are kept.
KEPT = 256


def check_fast(model: CausalLM, asked: str) -> None:
    """Raises InputError for a model without fast weights, of which something was asked that they alone can do."""
    if model.config.fast_weights is None:
        raise InputError(f"{asked}: this model has no fast weights, so that nothing in it adapts; leave it out")


class Moves:
    """|F| / |W_0| of every layer along a stream: `Seen` of an evaluation.

    Past KEPT places every second is dropped, so that any stream has between KEPT / 2 and KEPT of them.
    """

    def __init__(self, model: CausalLM) -> None:
        self.model = model
        self.layers: list[str] = []
        self.points: list[tuple[int, list[float]]] = []
        self.told, self.every = 0, 1

    def __call__(self, read: int, state: State) -> None:
        self.told += 1
        if self.told % self.every:
            return
        moves = relative_moves(self.model, state)
        self.layers = [name for name, _ in moves]
        self.points.append((read, [float(move.mean()) for _, move in moves]))
        if len(self.points) > KEPT:
            self.points, self.every = self.points[1::2], 2 * self.every

    def to_json(self) -> dict[str, Any]:
        """Names of the layers, how many tokens were read, and there the move of every layer."""
        return {
            "layers": self.layers,
            "tokens": [read for read, _ in self.points],
            "moves": [moves for _, moves in self.points],
        }


@torch.no_grad()
def measure_fast_weights(model: CausalLM, tokens: Int[Tensor, "b t"]) -> dict[str, Any]:
    """What adapting is worth to a model with fast weights, dropout off, on windows of tokens (b, t), t of 2 or more.

    Returns:
        "layers", the names of those with fast weights; "moves", |F| / |W_0| of each at the end of a window, mean over
        windows; and by stretches of positions that double in length, whose last ones are "positions": "loss", mean nats
        of the next token, and "loss_without", the same of the same weights while they do not adapt.

    Raises:
        InputError: a model without fast weights.
    """
    check_fast(model, "measure_fast_weights")
    device = model.embedding.weight.device
    seen, targets = tokens[:, :-1].to(device), tokens[:, 1:].to(device)
    with evaluating(model):
        output = model(seen, targets=targets)
        with adapting(model, on=False):
            without = model(seen, targets=targets).losses
    assert output.losses is not None and without is not None
    moves = relative_moves(model, output.state)
    return {
        "layers": [name for name, _ in moves],
        "moves": [float(move.mean()) for _, move in moves],
        "positions": stretch_edges(seen.shape[1])[1:],
        "loss": stretches_of(output.losses.double().mean(0)),
        "loss_without": stretches_of(without.double().mean(0)),
    }
