"""Language models with a copy memory, of every mixer: the laws of models, over text whose suffixes repeat."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kmixer.errors import InputError
from kmixer.layers.copy_memory import nothing_seen
from kmixer.layers.roles import roles_of
from kmixer.models import CausalLM, ModelConfig, TransformerConfig
from kmixer.models.mixers.registry import CAUSAL_NAMES
from kmixer.state import join, nbytes, rows
from tests.models.laws import assert_a_split_gives_the_whole, draw_cuts, of_model, one_at_a_time

VOCABULARY = 4
STACK = {"width": 12, "layers": 3, "rank": 2, "base_kernel": {"kind": "conv", "size": 4}}
BLOCKS = {"width": 12, "layers": 2, "heads": 3, "kind": "transformer"}
MODELS: dict[str, dict[str, Any]] = {
    "all layers": {**STACK, "copy_memory": {}},
    "some, factorised, gated": {
        **STACK,
        "embedding_width": 5,
        "output_gate": True,
        "copy_memory": {"layers": [0, 2], "match_length": "both"},
    },
    "the last, refined, half of 16 tokens": {
        **STACK,
        "refinement": {"steps": 2},
        "copy_memory": {"layers": "last", "memory": 16, "match_length": "gate"},
    },
    "a pointer and the embedding of lengths": {
        **STACK,
        "head": {"kind": "untied"},
        "copy_memory": {"pointer": True, "match_length": "embedding", "memory": 40},
    },
    "a second memory": {**STACK, "copy_memory": {"memory": 40, "match_length": "gate", "second": 2}},
    "a pointer alone": {**STACK, "copy_memory": {"layers": "none", "pointer": True}},
    **{
        f"{name} blocks": {**BLOCKS, "mixers": name, "copy_memory": {"memory": 10, "match_length": "gate"}}
        for name in CAUSAL_NAMES
    },
}
kinds = pytest.mark.parametrize("kind", MODELS)


def parse(values: dict[str, Any]) -> ModelConfig | TransformerConfig:
    return (TransformerConfig if "kind" in values else ModelConfig).parse(values, source="test")


def make(kind: str) -> CausalLM:
    torch.manual_seed(0)
    model = CausalLM(parse(MODELS[kind]), VOCABULARY).double().eval()
    for name, parameter in model.named_parameters():  # away from the near-zero start, so that every path matters
        if parameter.ndim >= 2 or "copy_memory" in name or "pointer" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def make_tokens(t: int, b: int = 2) -> Tensor:
    return torch.randint(VOCABULARY, (b, t), generator=torch.Generator().manual_seed(t))


@kinds
@given(st.integers(1, 60), st.data())
def test_any_split_gives_the_whole(kind: str, t: int, data: st.DataObject) -> None:
    model = make(kind)
    cuts, start = draw_cuts(data, t), model.initial_state(2)
    assert_a_split_gives_the_whole(of_model(model, make_tokens(t)), t, cuts, start=start)


@kinds
def test_one_token_at_a_time_gives_the_whole(kind: str) -> None:
    assert_a_split_gives_the_whole(of_model(make(kind), make_tokens(60)), 60, one_at_a_time(60))


@kinds
@torch.no_grad()
def test_rows_at_different_positions_go_on_as_each_alone(kind: str) -> None:
    model = make(kind)
    read = [model(make_tokens(length, 1)).state for length in (3, 25, 41)]
    more = make_tokens(30, 3)
    together = model(more, join(read))
    for row, state in enumerate(read):
        alone = model(more[row : row + 1], state)
        torch.testing.assert_close(together.logits[row : row + 1], alone.logits, rtol=1e-9, atol=1e-9)
        again = model(more[row : row + 1], rows(together.state, [row])).logits
        torch.testing.assert_close(again, model(more[row : row + 1], alone.state).logits, rtol=1e-9, atol=1e-9)


@kinds
@torch.no_grad()
def test_logits_do_not_depend_on_later_tokens(kind: str) -> None:
    model, tokens = make(kind), make_tokens(50)
    before = model(tokens).logits
    tokens[:, 30] = (tokens[:, 30] + 1) % VOCABULARY
    after = model(tokens).logits
    torch.testing.assert_close(before[:, :30], after[:, :30], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(before[:, 30], after[:, 30])


@kinds
@torch.no_grad()
def test_a_kept_state_is_a_snapshot(kind: str) -> None:
    model, tokens = make(kind), make_tokens(40)
    kept = model(tokens[:, :20]).state
    expected = model(tokens[:, 20:], kept).logits
    model((tokens[:, 20:] + 1) % VOCABULARY, kept)
    assert torch.equal(model(tokens[:, 20:], kept).logits, expected)


@kinds
@torch.no_grad()
def test_copies_that_are_told_are_those_that_it_makes(kind: str) -> None:
    model, tokens = make(kind), make_tokens(40)
    begun = model(tokens[:, :17]).state
    expected = model(tokens[:, 17:], begun)
    assert model.copy_memory is not None
    told, _ = model.copy_memory.copies(tokens[:, 17:], begun.memory)
    for copies in (told, nothing_seen(tokens[:, 17:])):
        output = model(tokens[:, 17:], begun, copies=copies)
        assert torch.equal(output.logits, expected.logits) == (copies is told)
        assert all(map(torch.equal, output.state.memory, expected.state.memory))


@kinds
def test_losses_are_those_of_the_logits(kind: str) -> None:
    model, tokens = make(kind), make_tokens(60)
    losses = model(tokens[:, :-1], targets=tokens[:, 1:]).losses
    log_probabilities = torch.log_softmax(model(tokens[:, :-1]).logits, dim=-1)
    torch.testing.assert_close(losses, -log_probabilities.gather(-1, tokens[:, 1:, None]).squeeze(-1))


@kinds
def test_every_parameter_has_a_role_and_a_gradient(kind: str) -> None:
    model = make(kind)
    tokens = torch.cat([make_tokens(60), make_tokens(60)], 1)  # matches of all lengths
    assert list(roles_of(model)) == [name for name, _ in model.named_parameters()]
    model(tokens[:, :-1], targets=tokens[:, 1:]).losses.mean().backward()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:  # nobody reads the vectors of a pointer alone
            assert (kind, name.partition(".")[0]) == ("a pointer alone", "copy_memory")
            continue
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@kinds
@torch.no_grad()
def test_a_state_that_grows_is_known_to(kind: str) -> None:
    model = make(kind)
    sizes = [nbytes(model(make_tokens(t)).state) for t in (80, 160)]  # where memories stand at a half
    assert model.config.state_grows == (sizes[0] != sizes[1])


@pytest.mark.parametrize("like", [STACK, BLOCKS], ids=["k-stack", "blocks"])
@torch.no_grad()
def test_no_layers_are_the_model_without(like: dict[str, Any]) -> None:
    without = CausalLM(parse(like), VOCABULARY).double().eval()
    nothing = CausalLM(parse({**like, "copy_memory": {"layers": "none"}}), VOCABULARY).double().eval()
    nothing.load_state_dict(without.state_dict(), strict=False)
    tokens = make_tokens(30)
    assert torch.equal(nothing(tokens).logits, without(tokens).logits)


@pytest.mark.parametrize("kind", ["all layers", "a pointer and the embedding of lengths"])
def test_bfloat16_autocast_streams(kind: str) -> None:
    model, tokens = make(kind).float(), make_tokens(40)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        whole = model(tokens)
        begun = model(tokens[:, :17])
        rest = model(tokens[:, 17:], begun.state)
    torch.testing.assert_close(torch.cat([begun.logits, rest.logits], 1), whole.logits, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("memory", [3, 0, -2])
def test_a_memory_that_has_no_halves(memory: int) -> None:
    with pytest.raises(InputError, match=r"copy_memory\.memory: got"):
        parse({**STACK, "copy_memory": {"memory": memory}})
