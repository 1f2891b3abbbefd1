"""What adapting is worth and how far fast weights move, against the model's own losses and states."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kmixer.data.token_cache import Counts, TokenSplit
from kmixer.errors import InputError
from kmixer.layers.adapting import adapting, relative_moves
from kmixer.measure import fast_weights as measured
from kmixer.measure.dynamics import measure_dynamics
from kmixer.measure.evaluation import STREAM_CHUNK, evaluate, stretch_edges
from kmixer.measure.fast_weights import Moves, measure_fast_weights
from kmixer.models import CausalLM, ModelConfig

V = 7


def make(**settings: Any) -> CausalLM:
    torch.manual_seed(0)
    fast = {"layers": [0, 2], "chunk": 8, "rate": 0.1, **settings}
    values = {"width": 12, "layers": 3, "rank": 2, "fast_weights": fast}
    model = CausalLM(ModelConfig.parse(values, source="test"), V).double()
    for name, parameter in model.named_parameters():
        if "decay_logit" not in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def without() -> CausalLM:
    return CausalLM(ModelConfig(width=12, layers=3, rank=2), V)


def text(count: int) -> Tensor:
    return torch.randint(V, (count,), generator=torch.Generator().manual_seed(1), dtype=torch.int16)


def split(count: int) -> TokenSplit:
    return TokenSplit(text(count), Counts(count, count, count, 10))


@torch.no_grad()
def test_it_is_the_loss_position_by_position() -> None:
    model, tokens = make(), text(2 * 41).view(2, 41).long()
    found = measure_fast_weights(model, tokens)
    assert model.training
    model.eval()
    output = model(tokens[:, :-1], targets=tokens[:, 1:])
    with adapting(model, on=False):
        still = model(tokens[:, :-1], targets=tokens[:, 1:])
    assert found["positions"] == [1, 2, 4, 8, 16, 32, 40]
    for name, losses in (("loss", output.losses), ("loss_without", still.losses)):
        first = 0
        for last, mean in zip(found["positions"], found[name], strict=True):
            assert mean == pytest.approx(float(losses[:, first:last].mean()), rel=1e-12)
            first = last
    # The first chunk reads what nothing was written into.
    assert found["loss"][:4] == found["loss_without"][:4]
    assert found["loss"][4:] != found["loss_without"][4:]
    moves = relative_moves(model, output.state)
    assert found["layers"] == [name for name, _ in moves]
    assert found["moves"] == [pytest.approx(float(move.mean())) for _, move in moves]
    assert all(float(move.min()) > 0 for _, move in moves)
    assert all(float(move.max()) == 0 for _, move in relative_moves(model, still.state))


def test_training_records_it() -> None:
    tokens = text(2 * 41).view(2, 41).long()
    model = make()
    found = measure_dynamics(model, tokens)
    assert found["fast_weights"] == measure_fast_weights(model, tokens)
    assert len(found["fast_tau"]) == len(found["fast_weights"]["layers"]) == 2
    assert "fast_weights" not in measure_dynamics(without(), tokens)
    assert "fast_weights" not in measure_dynamics(model, tokens[:, :1])
    with pytest.raises(InputError, match="has no fast weights, so that nothing in it adapts; leave it out"):
        measure_fast_weights(without(), tokens)


@torch.no_grad()
def test_moves_along_a_stream_are_those_of_the_states() -> None:
    model, count = make(), 2 * STREAM_CHUNK + 100
    moves = Moves(model)
    told = evaluate(model, split(count), "stream", 0, moves)
    assert told == evaluate(model, split(count), "stream", 0)
    places = moves.to_json()
    assert places["tokens"] == [STREAM_CHUNK, 2 * STREAM_CHUNK, count - 1]
    model.eval()
    for read, values in zip(places["tokens"], places["moves"], strict=True):
        state = model(text(count)[None, :read].long()).state
        assert values == [pytest.approx(float(move.mean()), rel=1e-9) for _, move in relative_moves(model, state)]


def test_a_long_stream_keeps_a_bounded_number_of_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "KEPT", 8)
    model = make()
    state = model.initial_state(1)
    moves = Moves(model)
    for step in range(1, 200):
        moves(step, state)
        read = moves.to_json()["tokens"]
        assert len(read) <= 8
        assert step < 8 or len(read) >= 4
        assert {b - a for a, b in itertools.pairwise(read)} <= {read[0]}


@pytest.mark.parametrize("count", [11, 12, 29, 101])
@torch.no_grad()
def test_tenths_of_a_stream_are_its_losses_in_order(count: int) -> None:
    model = make().eval()
    tokens = text(count)[None].long()
    losses = model(tokens[:, :-1], targets=tokens[:, 1:]).losses[0]
    result = evaluate(model, split(count), "stream", 0)
    assert result.tenths is not None
    parts = [losses[[i for i in range(count - 1) if 10 * i // (count - 1) == tenth]] for tenth in range(10)]
    assert result.tenths == [pytest.approx(float(part.mean())) for part in parts]
    assert sum(map(len, parts)) == count - 1
    assert evaluate(model, split(10), "stream", 0).tenths is None
    assert evaluate(model, split(count), "windows", 5).tenths is None


def test_stretches_double() -> None:
    assert [stretch_edges(count) for count in (1, 2, 3, 8, 9)] == [
        [0, 1],
        [0, 1, 2],
        [0, 1, 2, 3],
        [0, 1, 2, 4, 8],
        [0, 1, 2, 4, 8, 9],
    ]
