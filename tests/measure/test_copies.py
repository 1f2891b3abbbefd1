"""What a copy memory is worth, against a count position by position."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kmixer.errors import InputError
from kmixer.layers.copy_memory import BUCKETS, bucket_of, nothing_seen
from kmixer.measure.copies import LENGTHS, measure_copies
from kmixer.measure.dynamics import measure_dynamics
from kmixer.models import CausalLM, ModelConfig
from kmixer.ops.suffix_automaton import suffix_matches

V = 5
SETTINGS: list[dict[str, Any]] = [
    {},
    {"layers": [1], "match_length": "both"},
    {"memory": 20, "pointer": True},
    {"layers": "none", "pointer": True},
]
kinds = pytest.mark.parametrize("settings", SETTINGS, ids=str)


def make(settings: dict[str, Any] | None) -> CausalLM:
    torch.manual_seed(0)
    values = {"width": 12, "layers": 3, "rank": 2, "base_kernel": {"kind": "conv", "size": 4}, "copy_memory": settings}
    model = CausalLM(ModelConfig.parse(values, source="test"), V).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


def repeating() -> Tensor:
    """Tokens whose matches are of all lengths, but 33 and more."""
    tokens = torch.randint(V, (2, 120), generator=torch.Generator().manual_seed(1))
    tokens[:, 80:110] = tokens[:, 10:40].clone()
    return tokens


def test_the_buckets_are_called_by_the_lengths_in_them() -> None:
    assert len(LENGTHS) == BUCKETS
    for bucket, name in enumerate(LENGTHS):
        low, _, high = name.removeprefix("over ").partition("-")
        first = int(low) + name.startswith("over ")
        last = int(high or first)
        assert bucket_of(torch.tensor([first, last])).tolist() == [bucket] * 2
        assert bucket_of(torch.tensor([last + 1])).tolist() == [min(bucket + 1, BUCKETS - 1)]


@kinds
@torch.no_grad()
def test_it_is_a_count_position_by_position(settings: dict[str, Any]) -> None:
    model, tokens = make(settings), repeating()
    found = measure_copies(model, tokens)
    assert model.training
    model.eval()
    assert model.copy_memory is not None
    copied, lengths, _ = suffix_matches(tokens[:, :-1], memory=model.copy_memory.memory)
    told = -model(tokens[:, :-1]).logits.log_softmax(-1)
    untold = -model(tokens[:, :-1], copies=nothing_seen(tokens[:, :-1])).logits.log_softmax(-1)
    for bucket in range(BUCKETS):
        at = [(row, t) for row in range(2) for t in range(119) if int(bucket_of(lengths[row, t])) == bucket]
        assert found["positions"][bucket] == len(at)
        if not at:
            assert found["right"][bucket] is found["loss"][bucket] is found["loss_without"][bucket] is None
            continue
        following = [int(tokens[row, t + 1]) for row, t in at]
        right = sum(int(copied[row, t]) == token for (row, t), token in zip(at, following, strict=True))
        assert found["right"][bucket] == (pytest.approx(right / len(at)) if bucket else None)
        for name, nats in (("loss", told), ("loss_without", untold)):
            mean = sum(float(nats[row, t, token]) for (row, t), token in zip(at, following, strict=True)) / len(at)
            assert found[name][bucket] == pytest.approx(mean)
    assert sum(found["positions"]) == 2 * 119
    assert found["positions"][-1] == 0 or model.copy_memory.memory is None
    assert found["right"][9] is None or found["right"][9] > 0.9  # of the 30 that come again


@kinds
@torch.no_grad()
def test_silent_copies_are_a_memory_whose_table_and_share_are_empty(settings: dict[str, Any]) -> None:
    model, tokens = make(settings), repeating()
    found = measure_copies(model, tokens)
    memory = model.copy_memory
    assert memory is not None
    memory.table.weight[1:] = memory.table.weight[0].clone()  # whatever is copied, row 0 is told
    if memory.length_gate is not None and memory.length_vector is not None:
        memory.length_gate[:, 1:] = memory.length_gate[:, :1].clone()
        memory.length_vector[1:] = memory.length_vector[0].clone()
    if model.pointer is not None:
        model.pointer.length_logit.fill_(-1e9)
    model.eval()
    nats = model(tokens[:, :-1], targets=tokens[:, 1:]).losses
    counted = [(loss or 0.0) * count for loss, count in zip(found["loss_without"], found["positions"], strict=True)]
    assert sum(counted) == pytest.approx(float(nats.sum()))


def test_training_records_it_with_the_gates_of_every_layer() -> None:
    for settings, shape in (({}, (3,)), ({"layers": "last", "match_length": "gate"}, (1, BUCKETS))):
        model = make(settings)
        found = measure_dynamics(model, repeating())
        assert found["copies"] == measure_copies(model, repeating())
        assert model.copy_memory is not None
        assert found["copies"]["layers"] == list(model.copy_memory.layers)
        assert torch.tensor(found["copy_gate"]).shape == shape
    without = measure_dynamics(make(None), repeating())
    assert not without.keys() & {"copies", "copy_gate"}


def test_a_window_of_one_token_has_nothing_to_predict() -> None:
    assert measure_copies(make({}), repeating()[:, :1])["positions"] == [0] * BUCKETS


def test_a_model_without_copies() -> None:
    with pytest.raises(InputError, match="has no copy memory"):
        measure_copies(make(None), repeating())
    with pytest.raises(InputError, match="this model has no copy memory, leave them out"):
        make(None)(repeating(), copies=nothing_seen(repeating()))
