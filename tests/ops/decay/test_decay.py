"""Laws of decayed linear attention: every backend agrees with the recurrence, and the state is explicit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from kmixer import native
from kmixer.errors import InputError
from kmixer.ops import decayed_linear_attention
from kmixer.ops.decay import block as decay_block
from kmixer.ops.decay import native as decay_native
from kmixer.ops.decay.recurrence import BACKENDS
from tests.conftest import threads_of_torch
from tests.models.laws import Call, assert_a_split_gives_the_whole, draw_cuts, one_at_a_time

FAST = ["mask", "block"]  # in every dtype; `native` is for float32
BUILT = pytest.mark.skipif(native.kernels() is None, reason="the compiled kernels were not built")
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}


def make_inputs(
    shape: tuple[int, int, int, int], decays: list[float], dtype: torch.dtype, seed: int = 0
) -> list[Tensor]:
    b, t, r, d = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    log_decay = torch.log(torch.tensor(decays[:r], dtype=torch.float64)).to(dtype)
    return [normal(b, t, r), normal(b, t, r), normal(b, t, d), log_decay, normal(b, r, d)]


def run_with_gradients(inputs: list[Tensor], backend: Any) -> dict[str, Tensor]:
    """Outputs, final state, and gradients of all five inputs for a loss that weighs every output differently."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    y, state = decayed_linear_attention(*leaves[:4], state=leaves[4], backend=backend)
    place, state_place = (torch.arange(x.numel(), device=x.device).view(x.shape) for x in (y, state))
    (y * torch.cos(place)).sum().backward(retain_graph=True)
    (state * torch.sin(state_place + 1.0)).sum().backward()
    names = ("dq", "dk", "dv", "dlog_decay", "dstate")
    return {"y": y.detach(), "state": state.detach()} | {n: x.grad for n, x in zip(names, leaves, strict=True)}


def assert_same(
    actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float, q: Tensor | None = None
) -> None:
    """Within `tolerance` of the largest value.

    Given q, dlog_decay may also be off by a twentieth of that of the sum of |q dq| over time: the fast forms take it as
    a difference of such sums, which can be hundreds of times larger than itself.
    """
    for name, value in expected.items():
        scale = value.abs().max().item() + 1e-30
        if name == "dlog_decay" and q is not None:
            scale += 0.05 * (q * expected["dq"]).abs().sum(1).max().item()
        assert (actual[name] - value).abs().max().item() <= tolerance * scale, name


@BUILT
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 100), st.integers(1, 40), st.integers(1, 150)),
    st.lists(st.floats(0.01, 1.0), min_size=40, max_size=40),
    st.integers(1, 4),
)
def test_the_compiled_recurrence_is_the_recurrence(
    shape: tuple[int, int, int, int], decays: list[float], threads: int
) -> None:
    inputs = make_inputs(shape, decays, torch.float32)
    with threads_of_torch(threads):
        actual = run_with_gradients(inputs, "native")
    reference = run_with_gradients([x.double() for x in inputs], "recurrent")
    actual = {name: value.double() for name, value in actual.items()}
    assert_same(actual, reference, 2e-5, inputs[0].double())


@BUILT
def test_the_compiled_recurrence_repeats_bit_for_bit_and_splits_anywhere() -> None:
    q, k, v, log_decay, state = make_inputs((3, 100, 5, 70), [0.01, 0.3, 0.9, 0.999, 1.0], torch.float32)
    first, second = (run_with_gradients([q, k, v, log_decay, state], "native") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    whole, final = decayed_linear_attention(q, k, v, log_decay, state=state, backend="native")
    for cut in (0, 1, 31, 32, 33, 99):
        head, middle = decayed_linear_attention(
            q[:, :cut], k[:, :cut], v[:, :cut], log_decay, state=state, backend="native"
        )
        tail, end = decayed_linear_attention(
            q[:, cut:], k[:, cut:], v[:, cut:], log_decay, state=middle, backend="native"
        )
        assert torch.equal(torch.cat([head, tail], 1), whole)
        assert torch.equal(end, final)


@BUILT
def test_the_compiled_recurrence_keeps_nan_where_it_belongs() -> None:
    q, k, v, log_decay, _ = make_inputs((2, 50, 2, 20), [0.5, 0.9], torch.float32)
    v[0, 20, 3] = torch.nan
    y, _ = decayed_linear_attention(q, k, v, log_decay, backend="native")
    assert bool(y[0, 20:, 3].isnan().all())
    y[0, 20:, 3] = 0.0
    assert bool(y.isfinite().all())


shapes = st.tuples(
    st.integers(1, 3),
    st.sampled_from([1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 97]),
    st.integers(1, 5),
    st.integers(1, 6),
)
decay_lists = st.lists(st.floats(0.01, 0.9999), min_size=5, max_size=5)


@given(shapes, decay_lists, st.integers(0, 1000))
@pytest.mark.parametrize("backend", FAST)
def test_backends_agree_with_the_recurrence_in_float64(
    backend: str, shape: tuple[int, int, int, int], decays: list[float], seed: int
) -> None:
    inputs = make_inputs(shape, decays, torch.float64, seed)
    assert_same(run_with_gradients(inputs, backend), run_with_gradients(inputs, "recurrent"), 1e-10)


@pytest.mark.parametrize("decay", [0.01, 0.05, 0.5, 0.9999])
@pytest.mark.parametrize("t", [1, 31, 32, 33, 1000])
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [(b, d) for b in FAST for d in (torch.float64, torch.float32)]
    + [pytest.param("native", torch.float32, marks=BUILT)],
)
def test_backends_agree_at_the_edges(backend: str, t: int, decay: float, dtype: torch.dtype) -> None:
    inputs = make_inputs((2, t, 3, 4), [decay, 0.9, decay], dtype)
    reference = run_with_gradients([x.double() for x in inputs], "recurrent")
    actual = {name: value.double() for name, value in run_with_gradients(inputs, backend).items()}
    assert_same(actual, reference, TOLERANCE[dtype])


@given(shapes, decay_lists, st.data())
@pytest.mark.parametrize("backend", ["recurrent", *FAST])
def test_any_split_gives_the_whole(
    backend: Any, shape: tuple[int, int, int, int], decays: list[float], data: st.DataObject
) -> None:
    q, k, v, log_decay, state = make_inputs(shape, decays, torch.float64)
    call = on_parts(q, k, v, log_decay, state, backend)
    assert_a_split_gives_the_whole(call, shape[1], draw_cuts(data, shape[1]), tolerance=1e-10)


def test_one_position_at_a_time_gives_the_whole() -> None:
    q, k, v, log_decay, state = make_inputs((2, 70, 3, 4), [0.01, 0.7, 0.9999], torch.float64)
    assert_a_split_gives_the_whole(on_parts(q, k, v, log_decay, state), 70, one_at_a_time(70), tolerance=1e-10)


def on_parts(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, start: Tensor, backend: Any = "auto") -> Call:
    """Calls on a part of the positions; a state of None is `start`."""

    def call(part: slice, state: Any) -> tuple[Tensor, Tensor]:
        state = start if state is None else state
        return decayed_linear_attention(q[:, part], k[:, part], v[:, part], log_decay, state=state, backend=backend)

    return call


@pytest.mark.parametrize("backend", ["recurrent", *FAST])
def test_a_batch_equals_its_rows(backend: Any) -> None:
    q, k, v, log_decay, state = make_inputs((3, 45, 2, 3), [0.3, 0.99], torch.float64)
    whole, final = decayed_linear_attention(q, k, v, log_decay, state=state, backend=backend)
    for row in range(3):
        one = slice(row, row + 1)
        y, s = decayed_linear_attention(q[one], k[one], v[one], log_decay, state=state[one], backend=backend)
        torch.testing.assert_close(y, whole[one], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(s, final[one], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["recurrent", *FAST])
@pytest.mark.parametrize("position", [0, 31, 32, 40])
def test_outputs_do_not_depend_on_later_inputs(backend: Any, position: int) -> None:
    q, k, v, log_decay, _ = make_inputs((1, 50, 2, 3), [0.5, 0.99], torch.float64)
    before, _ = decayed_linear_attention(q, k, v, log_decay, backend=backend)
    for changed in (q, k, v):
        changed[:, position] += 1.0
    after, _ = decayed_linear_attention(q, k, v, log_decay, backend=backend)
    assert torch.equal(before[:, :position], after[:, :position])
    assert not torch.equal(before[:, position], after[:, position])


@pytest.mark.parametrize("backend", ["recurrent", *FAST])
def test_gradcheck(backend: Any) -> None:
    inputs = [x.requires_grad_() for x in make_inputs((2, 35, 2, 2), [0.1, 0.98], torch.float64)]

    def function(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> Any:
        return decayed_linear_attention(q, k, v, log_decay, state=state, backend=backend)

    assert torch.autograd.gradcheck(function, inputs)


def test_a_missing_state_is_zeros() -> None:
    q, k, v, log_decay, state = make_inputs((2, 40, 2, 3), [0.4, 0.9], torch.float64)
    expected = decayed_linear_attention(q, k, v, log_decay, state=torch.zeros_like(state))
    torch.testing.assert_close(decayed_linear_attention(q, k, v, log_decay), expected)


@pytest.mark.parametrize("backend", ["recurrent", *FAST])
def test_an_empty_sequence_returns_the_state(backend: Any) -> None:
    q, k, v, log_decay, state = make_inputs((2, 0, 2, 3), [0.4, 0.9], torch.float64)
    y, after = decayed_linear_attention(q, k, v, log_decay, state=state, backend=backend)
    assert y.shape == (2, 0, 3)
    assert torch.equal(after, state)


def test_bfloat16_inputs_are_summed_in_float32() -> None:
    exact = make_inputs((2, 200, 3, 4), [0.2, 0.9, 0.999], torch.float64)
    rounded = [x.bfloat16() for x in exact[:3]]
    y, state = decayed_linear_attention(*rounded, exact[3].float())
    reference, final = decayed_linear_attention(*(x.double() for x in rounded), exact[3])
    assert y.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    # The state carries float32 error only; y is rounded to bfloat16 once, at the end.
    torch.testing.assert_close(state.double(), final, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y.double(), reference, rtol=2**-8, atol=1e-5)


@given(st.floats(1e-12, 1.0))
def test_chunks_keep_exponents_in_range(decay: float) -> None:
    chunk = decay_block._chunk_length(torch.log(torch.tensor([decay, 0.99])))
    assert chunk == 1 or -math.log(decay) * (chunk - 1) / 2 <= decay_block.MAX_EXPONENT * (1 + 1e-6)
    if decay >= 0.05:
        assert chunk == 32


@pytest.mark.parametrize(
    ("backend", "allowed"), [("recurrent", False), ("mask", True), ("block", False), ("auto", False)]
)
def test_only_mask_holds_a_tensor_of_all_outer_products(backend: str, allowed: bool) -> None:
    b, t, r, d = shape = (2, 96, 16, 16)
    inputs = make_inputs(shape, [0.9] * r, torch.float32)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        run_with_gradients(inputs, backend)
    most = max(event.self_cpu_memory_usage for event in seen.events() or [])  # bytes that one operator took
    assert most >= 4 * b * t * d
    assert (most >= 4 * b * t * r * d) == allowed


@pytest.mark.parametrize(
    ("operator", "dtype"),
    [
        (decay_block.block_decay, torch.float64),
        pytest.param(decay_native.native_decay, torch.float32, marks=BUILT),
    ],
)
def test_operators_are_well_formed(operator: Any, dtype: torch.dtype) -> None:
    """Schema, shapes without data, autograd and tracing, as torch.library checks them."""
    inputs = [x.requires_grad_() for x in make_inputs((2, 40, 3, 5), [0.2, 0.9, 0.99], dtype)]
    torch.library.opcheck(operator, tuple(inputs))


@pytest.mark.parametrize("backend", ["block", pytest.param("native", marks=BUILT)])
def test_second_derivatives_are_refused_not_left_out(backend: Any) -> None:
    leaves = [x.requires_grad_() for x in make_inputs((1, 40, 2, 3), [0.5, 0.9], torch.float32)]
    y, _ = decayed_linear_attention(*leaves[:4], backend=backend)
    with pytest.raises(InputError, match="for second derivatives use float64, with backend 'recurrent'"):
        torch.autograd.grad(y.sum(), leaves[0], create_graph=True)


@pytest.mark.parametrize("backend", ["recurrent", "mask", "block", pytest.param("native", marks=BUILT)])
def test_forward_mode_is_right_or_refused(backend: Any) -> None:
    q, k, v, log_decay, _ = make_inputs((1, 40, 2, 3), [0.5, 0.9], torch.float32)
    step = torch.tensor([0.5, -0.25])

    def total(log_decay: Tensor) -> Tensor:
        return decayed_linear_attention(q, k, v, log_decay, backend=backend)[0].sin().sum()

    if backend in ("block", "native"):
        with pytest.raises(InputError, match="no derivative in forward mode: for one use float64, with backend 'recur"):
            torch.func.jvp(total, (log_decay,), (step,))
    else:
        _, found = torch.func.jvp(total, (log_decay,), (step,))
        (gradient,) = torch.autograd.grad(total(log_decay.requires_grad_()), log_decay)
        torch.testing.assert_close(found, gradient @ step, rtol=1e-4, atol=1e-4)


def test_wrong_inputs_are_named() -> None:
    q, k, v, log_decay, state = make_inputs((2, 4, 2, 3), [0.5, 0.9], torch.float32)
    with pytest.raises(InputError, match=r"backend: got 'blok'; allowed: auto, recurrent, mask, block, native, triton"):
        decayed_linear_attention.__wrapped__(q, k, v, log_decay, backend="blok")  # past the annotation check
    assert set(BACKENDS) == {"auto", "recurrent", "mask", "block", "native", "triton"}
    with pytest.raises(InputError, match=r"backend 'native' needs float32 or smaller inputs on a CPU"):
        decayed_linear_attention(*(x.double() for x in (q, k, v, log_decay)), backend="native")
    with pytest.raises(InputError, match=r"state \(b, r, d\) = \(2, 2, 3\); got \(2, 3, 2\)"):
        decayed_linear_attention.__wrapped__(q, k, v, log_decay, state=state.mT)
    with pytest.raises(InputError, match=r"got q \(2, 4, 2\), k \(2, 3, 2\)"):
        decayed_linear_attention.__wrapped__(q, k[:, :3], v, log_decay)
