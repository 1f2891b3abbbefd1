"""Models with fast weights: exactly the model without while the filter is zero, in every stack; state, rows, files."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kmixer import native
from kmixer.data.tokenizers import CharTokenizer
from kmixer.errors import InputError
from kmixer.generation.prepared import why_not_prepared
from kmixer.interop.exported_step import StepModule
from kmixer.layers import FastWeights, attach_fast_weights
from kmixer.layers.adapting import adapting, relative_moves
from kmixer.layers.roles import LOGIT, TABLE, TRANSPOSED_MATRIX, roles_of
from kmixer.models import CausalLM, ModelConfig, TransformerConfig, count_flops, count_parameters
from kmixer.models.flops import state_bytes
from kmixer.models.mixers.registry import CAUSAL_NAMES
from kmixer.models.model_folder import put_weights
from kmixer.state import join, rows, tensors
from tests.models.laws import assert_a_split_gives_the_whole, draw_cuts, of_model, one_at_a_time

V = 7
STACK = {"width": 12, "layers": 3, "rank": 3}
BLOCKS = {"kind": "transformer", "width": 12, "layers": 3, "heads": 3}
MODELS: dict[str, dict[str, Any]] = {
    "k-stack": STACK,
    "refined": {**STACK, "refinement": {"steps": 2}},
    "dense": {**STACK, "base_kernel": {"kind": "dense", "size": 64}},
    "factorised": {**STACK, "embedding_width": 5},
    "copies": {**STACK, "copy_memory": {"match_length": "both", "memory": 16, "pointer": True, "second": 2}},
    "nanochat": {**BLOCKS, "blocks": "nanochat", "value_embeddings": True},
    **{name: {**BLOCKS, "mixers": name} for name in CAUSAL_NAMES},
}
SECTIONS: list[dict[str, Any]] = [{"chunk": 4}, {"chunk": 1, "layers": "every"}]
kinds = pytest.mark.parametrize("kind", MODELS)
sections = pytest.mark.parametrize("section", SECTIONS, ids=str)


def parse(values: dict[str, Any]) -> ModelConfig | TransformerConfig:
    return (TransformerConfig if "kind" in values else ModelConfig).parse(values, source="test")


def make(kind: str, section: dict[str, Any] | None = None, *, random: bool = True) -> CausalLM:
    torch.manual_seed(0)
    values = MODELS[kind] if section is None else {**MODELS[kind], "fast_weights": section}
    model = CausalLM(parse(values), V).double().eval()
    for parameter in model.parameters() if random else ():
        if parameter.ndim >= 2:
            nn.init.normal_(parameter, std=0.4)
    return model


def some_tokens(t: int, b: int = 2) -> Tensor:
    return torch.randint(V, (b, t), generator=torch.Generator().manual_seed(t))


@kinds
@sections
@settings(max_examples=3)
@given(t=st.integers(1, 20), data=st.data())
def test_any_split_gives_the_whole(kind: str, section: dict[str, Any], t: int, data: st.DataObject) -> None:
    model = make(kind, section)
    call = of_model(model, some_tokens(t))
    assert_a_split_gives_the_whole(call, t, draw_cuts(data, t), start=model.initial_state(2))
    assert_a_split_gives_the_whole(call, t, one_at_a_time(t))


@kinds
@sections
def test_a_fresh_model_is_the_one_without_exactly(kind: str, section: dict[str, Any]) -> None:
    """From one seed it has the weights of the other, and more; attached to a trained one it changes nothing."""
    without, fresh, tokens = make(kind, random=False), make(kind, section, random=False), some_tokens(30)
    own = dict(fresh.named_parameters())
    for name, parameter in without.named_parameters():
        assert torch.equal(parameter, own[name])
    expected = without(tokens).logits
    torch.testing.assert_close(fresh(tokens).logits, expected, rtol=1e-13, atol=1e-13)
    trained = make(kind)
    expected = trained(tokens).logits
    assert attach_fast_weights(trained, **section) is trained
    torch.testing.assert_close(trained(tokens).logits, expected, rtol=1e-13, atol=1e-13)
    assert trained.config == parse({**MODELS[kind], "fast_weights": section})
    assert [*dict(trained.named_parameters())] == [*own]


@kinds
def test_nothing_before_a_changed_token_changes_and_rows_are_alone(kind: str) -> None:
    model, tokens = make(kind, {"chunk": 4, "layers": "every"}), some_tokens(30, b=3)
    with torch.no_grad():
        before = model(tokens).logits
        changed = tokens.clone()
        changed[1, 13] = (changed[1, 13] + 1) % V
        after = model(changed).logits
        assert torch.equal(before[:, :13], after[:, :13]) and torch.equal(before[[0, 2]], after[[0, 2]])
        assert not torch.allclose(before[1, 16:], after[1, 16:])
        alone = torch.cat([model(tokens[row : row + 1]).logits for row in range(3)])
    torch.testing.assert_close(before, alone, rtol=1e-11, atol=1e-11)


@kinds
@sections
@settings(max_examples=3)
@given(data=st.data())
@torch.no_grad()
def test_packed_documents_are_separate_ones(kind: str, section: dict[str, Any], data: st.DataObject) -> None:
    model, t = make(kind, section), 20
    tokens = some_tokens(t)
    begins = [sorted({*data.draw(st.lists(st.integers(1, t - 1), max_size=2))}) for _ in range(2)]
    reset = torch.zeros(2, t, dtype=torch.bool)
    expected = torch.zeros(2, t, V, dtype=torch.float64)
    for row, firsts in enumerate(begins):
        reset[row, firsts] = True
        for first, last in zip([0, *firsts], [*firsts, t], strict=True):
            expected[row, first:last] = model(tokens[row : row + 1, first:last]).logits[0]
    output = model(tokens, reset=reset)
    torch.testing.assert_close(output.logits, expected, rtol=1e-10, atol=1e-10)
    losses = model(tokens, targets=tokens, reset=reset).losses
    torch.testing.assert_close(
        losses, nn.functional.cross_entropy(expected.mT, tokens, reduction="none"), rtol=1e-10, atol=1e-10
    )
    reset[:, 0] = True  # whatever came before
    again = model(tokens, output.state, reset=reset)
    torch.testing.assert_close(again.logits, expected, rtol=1e-10, atol=1e-10)
    with pytest.raises(InputError, match="reset: got some with trail=True"):
        model(tokens, reset=reset, trail=True)


@kinds
@torch.no_grad()
def test_rows_at_different_places_are_joined_and_put_in_order(kind: str) -> None:
    model, tokens = make(kind, {"chunk": 4, "layers": "every"}), some_tokens(30, b=3)
    lengths = [3, 10, 4]
    states = [model(tokens[row : row + 1, :n]).state for row, n in enumerate(lengths)]
    following = torch.cat([tokens[row : row + 1, n : n + 9] for row, n in enumerate(lengths)])
    expected = torch.cat([model(following[row : row + 1], state).logits for row, state in enumerate(states)])
    state = join(states)
    kept = [tensor.clone() for tensor in tensors(state)]
    torch.testing.assert_close(model(following, state).logits, expected, rtol=1e-10, atol=1e-10)
    order = [2, 0, 0]
    torch.testing.assert_close(
        model(following[order], rows(state, order)).logits, expected[order], rtol=1e-10, atol=1e-10
    )
    assert all(torch.equal(*pair) for pair in zip(kept, tensors(state), strict=True))  # a state is a snapshot


def test_targets_are_made_of_what_is_embedded_before_dropout() -> None:
    values = {**STACK, "dropout": {"embedding": 0.5}, "fast_weights": {"chunk": 4}}
    torch.manual_seed(0)
    model = CausalLM(parse(values), V).double().train()
    given: list[Tensor] = []
    for part in model.modules():
        if isinstance(part, FastWeights):
            part.register_forward_pre_hook(lambda module, inputs: given.append(inputs[1]))
    tokens = some_tokens(8)
    model(tokens)
    assert len(given) == 2
    assert all(torch.equal(source, model.from_embedding(model.embedding(tokens))) for source in given)


def test_the_default_layers_are_the_last_and_the_middle_one() -> None:
    for layers, chosen in ((1, [0]), (2, [0, 1]), (3, [1, 2]), (6, [2, 5])):
        model = CausalLM(parse({**STACK, "layers": layers, "fast_weights": {}}), V)
        names = [f"stack.blocks.{layer}.feed_forward.fast" for layer in chosen]
        assert [name for name, part in model.named_modules() if isinstance(part, FastWeights)] == names


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"layers": [3]}, "fast_weights.layers: got [3]; allowed: different numbers from 0 to 2"),
        ({"layers": [1, 1]}, "fast_weights.layers: got [1, 1]"),
        ({"taps": 2}, "fast_weights: taps: got 2"),
        ({"tau": 1.0}, "fast_weights: tau: got 1.0; allowed: between 100 and 100000 tokens"),
        ({"max_norm": 1.0, "chunk": 1}, "fast_weights: max_norm: got 1.0 with chunk 1"),
        ({"target": "logits"}, "fast_weights.target: got 'logits'; allowed: 'embed' or 'hidden'"),
        ({"decay": 0.9}, "unknown key fast_weights.decay"),
    ],
    ids=str,
)
@pytest.mark.parametrize("values", [STACK, BLOCKS], ids=["k-stack", "transformer"])
def test_a_mistake_in_the_section_is_one_line(values: dict[str, Any], section: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        parse({**values, "fast_weights": section})
    assert message in str(error.value) and "\n" not in str(error.value)


def test_attaching_says_what_it_cannot_do() -> None:
    with pytest.raises(InputError, match="model: it has fast weights"):
        attach_fast_weights(make("k-stack", {}))
    with pytest.raises(InputError, match="model: got Linear; allowed: a language model"):
        attach_fast_weights(nn.Linear(2, 2))
    with pytest.raises(InputError, match=r"attach_fast_weights: fast_weights.layers: got \[7\]"):
        attach_fast_weights(make("k-stack"), layers=[7])


def test_no_tau_survives_a_file() -> None:
    config = parse({**STACK, "fast_weights": {"tau": None}})
    again = ModelConfig.parse(config.model_dump(mode="json", exclude_none=True), source="test")
    assert again == config and again.fast_weights.options()["tau"] is None


def test_what_is_learned_is_not_saved_and_old_weights_load(tmp_path: Path) -> None:
    model, tokens = make("k-stack", {"chunk": 4}), some_tokens(20)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model(tokens)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert {name.rsplit(".", 1)[-1] for name in before if "fast" in name} == {"filter", "target", "decay_logit"}
    old = make("k-stack")
    attached = attach_fast_weights(copy.deepcopy(old), chunk=4)
    put_weights(old, {n: t for n, t in attached.state_dict().items() if "fast" not in n}, "test")
    assert CharTokenizer is not None


def test_an_optimiser_keeps_the_taps_from_muon() -> None:
    roles = roles_of(make("k-stack", {"chunk": 4}))
    fast = {name.rsplit(".", 1)[-1]: role for name, role in roles.items() if ".fast." in name}
    assert fast == {"filter": TABLE, "target": TRANSPOSED_MATRIX, "decay_logit": LOGIT}


@pytest.mark.parametrize("section", [{"chunk": 4}, {"chunk": 1}, {"chunk": 4, "tau": None, "taps": 3}], ids=str)
@pytest.mark.parametrize("kind", ["k-stack", "refined", "softmax", "nanochat"])
def test_operations_parameters_and_bytes_are_counted(kind: str, section: dict[str, Any]) -> None:
    without, model = make(kind).float(), make(kind, section).float()
    d, f, passes = 12, model.stack.blocks[1].feed_forward.down.in_features, 2 if kind == "refined" else 1
    c, taps = section["chunk"], section.get("taps", 5)
    more = (6 * d * f if c == 1 else 4 * d * f + 2 * taps * d) + 2 * d * d
    assert count_flops(model, 32) - count_flops(without, 32) == 2 * passes * more
    logits = 0 if section.get("tau", 0) is None else f if c == 1 else 1
    parameters = d * d + (0 if c == 1 else taps * d) + logits
    assert sum(count_parameters(model).values()) - sum(count_parameters(without).values()) == 2 * parameters
    a_token, constant = state_bytes(model, 4)
    with torch.no_grad():
        state = model(some_tokens(4 * 8 - 1, b=1)).state
    assert sum(part.nbytes for part in tensors(state) if part.ndim > 1) == constant + a_token * 31
    assert state_bytes(model, 2)[1] - state_bytes(without, 2)[1] == 2 * passes * (
        4 * d * f + 2 * (f if c == 1 else (c - 1) * (d + f))
    )


def test_an_export_and_where_it_does_not_know_them_prepared_decoding_refuse_by_name() -> None:
    tokens = make("k-stack", {"chunk": 1}).float()
    if native.kernels() is not None:
        assert why_not_prepared(tokens) == "stack.blocks.1.feed_forward.fast has chunks of one token"
    model = make("k-stack", {"chunk": 4}).float()
    with adapting(model, False):
        if native.kernels() is not None:
            assert why_not_prepared(model) == "stack.blocks.1.feed_forward.fast is switched off"
    with pytest.raises(InputError, match=r"stack.blocks.1.feed_forward.fast \(FastWeights\) is none of the parts"):
        StepModule(model)


@kinds
@torch.no_grad()
def test_how_far_weights_moved_is_said_by_layer(kind: str) -> None:
    model, tokens = make(kind, {"chunk": 4}), some_tokens(30)
    moves = relative_moves(model, model(tokens).state)
    names = ["blocks.1", "blocks.2"]
    assert [name for name, _ in moves] == (
        [f"pass {i}, {name}" for i in range(2) for name in names] if kind == "refined" else names
    )
    assert all(move.shape == (2,) and (move > 0).all() for _, move in moves)
    with adapting(model, False):
        assert not any(move.any() for _, move in relative_moves(model, model(tokens).state))
    assert relative_moves(make(kind), make(kind)(tokens).state) == []


def test_layers_that_adapt_are_not_compiled() -> None:
    model = make("k-stack", {"chunk": 4, "layers": [1]})
    model.compile_layers("eager")
    compiled = [block._compiled_call_impl is not None for block in model.stack.blocks]
    assert compiled == [True, False, True]
