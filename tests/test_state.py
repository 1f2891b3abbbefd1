"""Laws of states: a call changes none, and rows, joined batches and bytes are what they seem, for all that has one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kmixer.errors import InputError
from kmixer.layers import BaseKernel
from kmixer.models import CausalLM, ModelConfig, TransformerConfig
from kmixer.models.flops import state_bytes
from kmixer.ops.base_kernel import KINDS
from kmixer.state import State, check_state, in_order, join, map_tensors, nbytes, rows, tensors
from tests.models.test_mixers import FORMS, WIDTH, make_mixer

VOCABULARY = 11
LENGTH = 24  # positions of a sequence, all calls together
Call = Callable[[Tensor, Any], tuple[Tensor, Any]]

STACKS: dict[str, dict[str, Any]] = {
    **{f"k-stack, {kind}": {"base_kernel": {"kind": kind, "size": LENGTH}} for kind in ("dense", "toeplitz", "none")},
    "k-stack, low rank of each layer": {
        "base_kernel": {"kind": "low_rank", "size": LENGTH, "rank": 2, "shared": False}
    },
    "k-stack, refined": {"base_kernel": {"kind": "conv", "size": 4}, "refinement": {"steps": 2}},
    "transformer": {"heads": 3, "mixers": "softmax", "windows": "SL", "window": 5},
    "nanochat": {"heads": 3, "mixers": "softmax", "blocks": "nanochat"},
    "transformer of several": {"heads": 3, "layers": 4, "mixers": ["gaussian", "k2", "hierarchical", "softmax"]},
}


def make_model(settings: dict[str, Any]) -> CausalLM:
    torch.manual_seed(0)
    values = {"width": WIDTH, "layers": 2, **settings}
    config = TransformerConfig if "heads" in settings else ModelConfig
    if "heads" not in settings:
        values["rank"] = 3
    model = CausalLM(config.parse(values, source="test"), VOCABULARY).double().eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def as_call(name: str, dtype: torch.dtype = torch.float64) -> tuple[Call, Callable[[int], Any], bool]:
    """What is called, its initial state, and whether it takes tokens."""
    if name in STACKS:
        model = make_model(STACKS[name]).to(dtype)

        def call(x: Tensor, state: Any) -> tuple[Tensor, Any]:
            output = model(x, state)
            assert output.logits is not None
            return output.logits, output.state

        return call, model.initial_state, True
    if name in KINDS:
        kernel: Any = BaseKernel(name, LENGTH, rank=2).to(dtype)  # type: ignore[arg-type]
        return kernel, lambda b: kernel.initial_state(b, WIDTH), False
    mixer = make_mixer(next(form for form in FORMS if str(form) == name)).to(dtype)
    return mixer, mixer.initial_state, False


CALLED = [*map(str, FORMS), *KINDS, *STACKS]
called = pytest.mark.parametrize("name", CALLED)
few = settings(max_examples=12)


def inputs(b: int, t: int, *, tokens: bool, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(b + 100 * t)
    if tokens:
        return torch.randint(VOCABULARY, (b, t), generator=generator)
    return torch.randn(b, t, WIDTH, generator=generator, dtype=dtype)


def assert_same(actual: Any, expected: Any, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@called
@torch.no_grad()
def test_a_call_leaves_the_state_as_it_was(name: str) -> None:
    call, _, tokens = as_call(name)
    x = inputs(2, 15, tokens=tokens)
    _, state = call(x[:, :9], None)
    before = map_tensors(Tensor.clone, state)
    first, after = call(x[:, 9:], state)
    call(x[:, 9:10], state)
    torch.testing.assert_close(state, before, rtol=0, atol=0)
    second, again = call(x[:, 9:], state)
    torch.testing.assert_close((second, again), (first, after), rtol=0, atol=0)


@called
@few
@given(st.data())
@torch.no_grad()
def test_rows_of_an_answer_are_the_answer_to_rows(name: str, data: st.DataObject) -> None:
    call, initial_state, tokens = as_call(name)
    start, t = data.draw(st.integers(0, 12)), data.draw(st.integers(1, 5))
    chosen = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=5))
    x = inputs(4, start + t, tokens=tokens)
    _, state = call(x[:, :start], initial_state(4))
    y, after = call(x[:, start:], state)
    found, found_after = call(x[chosen, start:], rows(state, chosen))
    assert_same(found, y[chosen])
    assert_same(found_after, rows(after, chosen))


@called
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@few
@given(data=st.data())
@torch.no_grad()
def test_rows_of_a_joined_batch_go_on_as_they_would_alone(name: str, dtype: torch.dtype, data: st.DataObject) -> None:
    """Also where they stand at different positions, and are chosen and joined again on the way."""
    call, initial_state, tokens = as_call(name, dtype)
    starts = data.draw(st.lists(st.integers(0, 12), min_size=1, max_size=4))
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    x = inputs(len(starts), LENGTH, tokens=tokens, dtype=dtype)
    alone = [call(x[i : i + 1, :start], initial_state(1))[1] for i, start in enumerate(starts)]
    together, order = join(alone), list(range(len(starts)))
    done = list(starts)
    for size in sizes:
        new = torch.cat([x[i : i + 1, done[i] : done[i] + size] for i in order])
        y, together = call(new, together)
        for place, i in enumerate(order):
            expected, alone[i] = call(x[i : i + 1, done[i] : done[i] + size], alone[i])
            assert_same(y[place : place + 1], expected, 1e-9 if dtype == torch.float64 else 2e-3)
            done[i] += size
        if data.draw(st.booleans()) and len(order) > 1:  # the last row goes, the first comes back at the end
            together = join([rows(together, list(range(1, len(order) - 1)) or [0]), rows(together, [0])])
            order = [*(order[1:-1] or order[:1]), order[0]]
            alone, done = list(alone), list(done)
            if len(set(order)) < len(order):
                return


@given(st.permutations(range(6)), st.lists(st.integers(0, 6), max_size=3))
def test_parts_of_a_batch_in_order_are_the_batch(rows_of_it: list[int], cuts: list[int]) -> None:
    state = (torch.arange(6), (None, torch.arange(36.0).view(6, 2, 3)))
    edges = [0, *sorted(cuts), 6]
    members = [rows_of_it[start:stop] for start, stop in pairwise(edges) if stop > start]
    again = in_order([rows(state, of_part) for of_part in members], members)
    assert all(map(torch.equal, tensors(again), tensors(state)))


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_bytes_of_a_state_are_those_that_are_counted(name: str, dtype: torch.dtype) -> None:
    if "windows" in STACKS[name]:
        pytest.skip("what is counted knows no windows")
    model = make_model(STACKS[name]).to(dtype)
    a_token, constant = state_bytes(model, dtype.itemsize)
    for b, t in ((1, 8), (3, 16)):
        state = model(inputs(b, t, tokens=True)).state
        positions = sum(tensor.nbytes for tensor in tensors(state) if tensor.dtype == torch.int64)
        assert nbytes(state) == b * (constant + t * a_token) + positions


@called
@torch.no_grad()
def test_tensors_own_their_memory(name: str) -> None:
    call, _, tokens = as_call(name)
    _, state = call(inputs(2, 17, tokens=tokens), None)
    _, later = call(inputs(2, 3, tokens=tokens), state)
    for made in (state, later, rows(later, [1, 0, 1]), join([state, later])):
        for tensor in tensors(made):
            assert tensor.untyped_storage().nbytes() == tensor.nbytes
    assert {tensor.dtype for tensor in tensors(later)} <= {torch.float64, torch.int64}
    assert all(len(tensor) == 2 for tensor in tensors(later))


@called
def test_gradients_go_through_rows_and_joined_batches(name: str) -> None:
    call, initial_state, tokens = as_call(name)
    if tokens:
        return
    x = inputs(2, 9, tokens=False).requires_grad_()
    _, first = call(x[:1, :5], initial_state(1))
    _, second = call(x[1:, :3], initial_state(1))
    y, _ = call(x[:, 5:7], rows(join([first, second]), [1, 0]))
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    assert gradient[0, :5].abs().sum() > 0
    assert gradient[1, :3].abs().sum() > 0


def test_what_cannot_be_joined_or_chosen_is_named() -> None:
    state = (torch.zeros(2, 3, 4), None)
    for other in ((torch.zeros(2, 3, 5), None), (torch.zeros(2, 3, 4), torch.zeros(2)), (None, None), torch.zeros(2)):
        with pytest.raises(InputError, match="join: the states are of different models"):
            join([state, other])
    with pytest.raises(InputError, match="join: got no state; give one or more"):
        join([])
    for index in (-1, 2):
        with pytest.raises(InputError, match=r"rows: got \[.*\]; allowed: 0 to 1, the rows of this state"):
            rows(state, [0, index])


@pytest.mark.parametrize("name", STACKS)
def test_a_state_that_does_not_fit_is_named(name: str) -> None:
    model = make_model(STACKS[name])
    initial = model.initial_state(1)
    good = model(inputs(3, 6, tokens=True)).state
    check_state(good, initial, 3)
    check_state(model.initial_state(3), initial, 3)
    bad: list[State] = [
        (),
        torch.zeros(3),
        (*good, good),
        map_tensors(lambda tensor: tensor[..., None], good),
        map_tensors(lambda tensor: tensor.to(torch.complex128), good),
        map_tensors(lambda tensor: torch.cat([tensor, tensor], dim=-1), good),
        rows(good, [0, 1]),
    ]
    for state in bad:
        with pytest.raises(InputError, match=r"^state: got .*; allowed there: .*; give what this model returned .*$"):
            check_state(state, initial, 3)


def test_layers_under_torch_compile_carry_states_on() -> None:
    answer = subprocess.run(
        [sys.executable, "-m", "tests.compiled_states"], capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stderr
