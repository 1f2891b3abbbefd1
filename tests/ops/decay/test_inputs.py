"""What decayed linear attention takes: devices, dtypes and decays that do not fit are named; sizes may be 0."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kmixer import native
from kmixer.errors import InputError
from kmixer.ops import decayed_linear_attention
from tests.ops.decay.test_decay import assert_same, make_inputs, run_with_gradients

BUILT = pytest.mark.skipif(native.kernels() is None, reason="the compiled kernels were not built")
BACKENDS = ["auto", "recurrent", "mask", "block", pytest.param("native", marks=BUILT)]
NAMES = ("q", "k", "v", "log_decay", "state")


pytestmark = pytest.mark.usefixtures("unchecked")


def run(inputs: list[Tensor], backend: Any = "auto") -> tuple[Tensor, Tensor]:
    return decayed_linear_attention(*inputs[:4], state=inputs[4], backend=backend)


def ordinary() -> list[Tensor]:
    return make_inputs((2, 40, 2, 3), [0.5, 0.9], torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_one_device(name: str, backend: Any) -> None:
    inputs = ordinary()
    inputs[NAMES.index(name)] = inputs[NAMES.index(name)].to("meta")
    with pytest.raises(InputError, match=rf"{name} on meta.*; all tensors are on one device"):
        run(inputs, backend)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
@pytest.mark.parametrize("name", NAMES)
def test_real_floats(name: str, dtype: torch.dtype) -> None:
    inputs = ordinary()
    inputs[NAMES.index(name)] = inputs[NAMES.index(name)].to(dtype)
    what = str(dtype).removeprefix("torch.")
    with pytest.raises(InputError, match=rf"got {name} in {what}; allowed: float64, float32, bfloat16, float16$"):
        run(inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("log_decay", "given"), [(0.1, "0.1"), (float("nan"), "nan"), (float("inf"), "inf")])
def test_decays_above_one_are_refused(log_decay: float, given: str, backend: Any) -> None:
    inputs = ordinary()
    inputs[3] = torch.tensor([-1.0, log_decay])
    with pytest.raises(InputError, match=rf"got a log_decay of {given}; allowed: \[-inf, 0\]"):
        run(inputs, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("t", [1, 2, 40])
def test_a_decay_of_zero_forgets_all(backend: Any, t: int) -> None:
    inputs = make_inputs((2, t, 3, 5), [0.0, 0.9, 1.0], torch.float32)
    assert inputs[3][0] == -torch.inf
    expected = run_with_gradients([x.double() for x in inputs], "recurrent")
    assert all(bool(value.isfinite().all()) for value in expected.values())
    actual = {name: value.double() for name, value in run_with_gradients(inputs, backend).items()}
    assert_same(actual, expected, 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 5, 2, 3), (2, 5, 0, 3), (2, 5, 2, 0), (2, 0, 2, 3), (0, 0, 0, 0), (2, 1, 0, 3)])
def test_nothing_is_a_sequence(shape: tuple[int, int, int, int], backend: Any) -> None:
    b, t, r, d = shape
    inputs = make_inputs(shape, [0.5, 0.9], torch.float32)
    y, state = run(inputs, backend)
    assert y.shape == (b, t, d)
    assert not y.any() or t * d * r * b
    torch.testing.assert_close(state, inputs[4] if not t else run(inputs, "recurrent")[1])
    leaves = [x.clone().requires_grad_() for x in inputs]
    y, state = run(leaves, backend)
    gradients = torch.autograd.grad(y.sum() + state.sum(), leaves, allow_unused=True)
    assert all(g is None or g.shape == x.shape for g, x in zip(gradients, leaves, strict=True))
