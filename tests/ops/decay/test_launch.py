"""Laws of the `triton` backend: it is the recurrence, on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from kmixer import native
from kmixer.errors import InputError
from kmixer.ops import decayed_linear_attention
from kmixer.ops.decay import recurrence as decay
from tests.ops.decay.test_decay import assert_same, make_inputs, run_with_gradients

pytest.importorskip("triton", reason="triton is not installed: install kmixer[gpu]")

from kmixer.ops.decay import launch as decay_triton

DEVICE = "cpu" if decay_triton.INTERPRETED else "cuda"
on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="no GPU")
Shape = tuple[int, int, int, int]  # b t r d


def on_device(inputs: list[Tensor]) -> list[Tensor]:
    return [x.to(DEVICE) for x in inputs]


def run_triton(inputs: list[Tensor]) -> dict[str, Tensor]:
    """Outputs, state and gradients on this machine's device, in float64 on the CPU."""
    results = run_with_gradients(on_device(inputs), "triton")
    return {name: value.cpu().double() for name, value in results.items()}


def run_definition(inputs: list[Tensor], backend: str = "recurrent") -> dict[str, Tensor]:
    return run_with_gradients([x.double() for x in inputs], backend)


def decays(r: int, first: float) -> list[float]:
    return ([first, 0.9, first, 0.5, 0.999] * r)[:r]


def short_segments(monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    for rank, row in decay_triton._CONFIGURATIONS.items():
        monkeypatch.setitem(decay_triton._CONFIGURATIONS, rank, row._replace(segment=length))


@pytest.mark.parametrize("decay", [0.01, 0.05, 0.9999, 1.0])
@pytest.mark.parametrize("t", [1, 15, 16, 17, 31, 33, 100])
def test_it_is_the_recurrence_at_every_length(t: int, decay: float) -> None:
    inputs = make_inputs((2, t, 3, 20), decays(3, decay), torch.float32)
    assert_same(run_triton(inputs), run_definition(inputs), 1e-4)


@pytest.mark.parametrize("r", [1, 3, 4, 16, 33, 128])
@pytest.mark.parametrize("d", [1, 16, 20, 64, 130])
def test_it_is_the_recurrence_at_every_rank_and_width(r: int, d: int) -> None:
    inputs = make_inputs((1, 35, r, d), decays(r, 0.01), torch.float32)
    assert_same(run_triton(inputs), run_definition(inputs), 1e-4)


@pytest.mark.parametrize("decay", [0.01, 0.05, 0.9999])
@pytest.mark.parametrize("r", [3, 20])
def test_it_is_the_recurrence_across_segments(r: int, decay: float) -> None:
    t = 2 * decay_triton.configuration(r, 20).segment + 21
    inputs = make_inputs((1, t, r, 20), decays(r, decay), torch.float32)
    assert_same(run_triton(inputs), run_definition(inputs), 1e-4)


@pytest.mark.parametrize("t", [33, 17 * 16, 17 * 16 + 3])
def test_it_is_the_recurrence_across_many_segments(monkeypatch: pytest.MonkeyPatch, t: int) -> None:
    """The scan takes the boundaries between segments by sixteens: here 2 of them, a full group, and one more."""
    short_segments(monkeypatch, 16)
    inputs = make_inputs((1, t, 3, 20), decays(3, 0.97), torch.float32)
    assert_same(run_triton(inputs), run_definition(inputs), 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_keep_a_float32_state(dtype: torch.dtype) -> None:
    exact = make_inputs((1, 150, 5, 20), decays(5, 0.01), torch.float32)
    inputs = [x.to(dtype) for x in exact[:3]] + exact[3:]
    assert_same(run_triton(inputs), run_definition(inputs), 1e-2)
    results = run_with_gradients(on_device(inputs), "triton")
    assert all(results[name].dtype == dtype for name in ("y", "dq", "dk", "dv"))
    assert all(results[name].dtype == torch.float32 for name in ("state", "dlog_decay", "dstate"))


def test_dtypes_may_differ() -> None:
    q, k, v, log_decay, state = make_inputs((1, 40, 3, 20), decays(3, 0.05), torch.float32)
    inputs = [q, k.half(), v.bfloat16(), log_decay, state]
    assert_same(run_triton(inputs), run_definition(inputs), 1e-2)


@pytest.mark.parametrize("cuts", [(0,), (1,), (16,), (17, 128), (3, 19, 140)])
def test_any_split_gives_the_whole(cuts: tuple[int, ...]) -> None:
    inputs = make_inputs((1, 150, 3, 20), decays(3, 0.97), torch.float32)
    q, k, v, log_decay, state = on_device(inputs)
    whole, final = decayed_linear_attention(q, k, v, log_decay, state=state, backend="triton")
    pieces = []
    for start, stop in zip([0, *cuts], [*cuts, 150], strict=True):
        part = slice(start, stop)
        y, state = decayed_linear_attention(
            q[:, part], k[:, part], v[:, part], log_decay, state=state, backend="triton"
        )
        pieces.append(y)
    assert_same({"y": torch.cat(pieces, 1), "state": state}, {"y": whole, "state": final}, 1e-5)


def test_outputs_do_not_depend_on_later_inputs() -> None:
    q, k, v, log_decay, _ = on_device(make_inputs((1, 150, 3, 20), decays(3, 0.9), torch.float32))
    for position in (0, 31, 32, 130):
        before, _ = decayed_linear_attention(q, k, v, log_decay, backend="triton")
        for changed in (q, k, v):
            changed[:, position] += 1.0
        after, _ = decayed_linear_attention(q, k, v, log_decay, backend="triton")
        assert torch.equal(before[:, :position], after[:, :position])
        assert not torch.equal(before[:, position], after[:, position])


def test_strides_do_not_matter() -> None:
    inputs = make_inputs((2, 20, 3, 20), decays(3, 0.9), torch.float32)
    strided = [torch.stack([x, x], dim=-1)[..., 0] for x in inputs]
    assert not strided[0].is_contiguous()
    assert_same(run_triton(strided), run_triton(inputs), 0.0)


def test_two_runs_agree_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    short_segments(monkeypatch, 16)
    inputs = make_inputs((1, 40, 5, 70), decays(5, 0.05), torch.float32)
    assert_same(run_triton(inputs), run_triton(inputs), 0.0)


# In the triangle of scores that is dropped.
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered in matmul")
def test_decays_to_nothing_are_near_the_definition() -> None:
    """Decays under 1e-4 are taken as 1e-4, and their own gradient as zero."""
    inputs = make_inputs((2, 40, 4, 20), [0.0, 1e-9, 2e-4, 0.9], torch.float32)
    actual, expected = run_triton(inputs), run_definition(inputs)
    assert torch.equal(actual["dlog_decay"][:2], torch.zeros(2, dtype=torch.float64))
    assert_same(actual, expected, 5e-4)


def test_it_is_a_well_formed_operator() -> None:
    """Schema, shapes without data, autograd and tracing, as torch.library checks them."""
    inputs = [x.requires_grad_() for x in on_device(make_inputs((1, 20, 3, 16), decays(3, 0.9), torch.float32))]
    torch.library.opcheck(decay_triton._forward, tuple(inputs))


COMPILED = """
import sys, torch
from kmixer.ops import decayed_linear_attention
def step(q, k, v, log_decay):
    y, state = decayed_linear_attention(q * 2, k, v, log_decay, backend="triton")
    return (y * y).sum() + state.sum()
def gradients(function):
    torch.manual_seed(0)
    sizes = (1, 140, 3), (1, 140, 3), (1, 140, 16), (3,)
    leaves = [torch.rand(*size, device=sys.argv[1]).requires_grad_() for size in sizes]
    function(*leaves[:3], leaves[3] - 1).backward()
    return [leaf.grad for leaf in leaves]
compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
torch.testing.assert_close(gradients(compiled), gradients(step))
"""


def test_torch_compile_sees_one_graph() -> None:
    # In a process of its own: here the checks of annotations would break the graph.
    subprocess.run([sys.executable, "-c", COMPILED, DEVICE], check=True, timeout=120)


def test_importing_kmixer_does_not_import_triton() -> None:
    code = "import sys, kmixer.layers; sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def call(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, _: Tensor) -> Any:
    return decayed_linear_attention(q, k, v, log_decay, backend="triton")


def test_where_it_cannot_run_it_says_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs((1, 4, 2, 3), [0.5, 0.9], torch.float32)
    with pytest.raises(InputError, match=r"takes float32, bfloat16 and float16; got q, k, v in .*float64"):
        call(*on_device([x.double() for x in inputs]))
    with pytest.raises(InputError, match=r"a rank r from 1 to 128; got 129"):
        call(*on_device(make_inputs((1, 4, 129, 3), decays(129, 0.9), torch.float32)))
    monkeypatch.setattr(decay_triton, "INTERPRETED", False)
    with pytest.raises(InputError, match=r"needs tensors on a CUDA device; got cpu"):
        call(*inputs)
    monkeypatch.setattr(decay, "TRITON_INSTALLED", False)
    with pytest.raises(InputError, match=r"needs the package triton: install kmixer\[gpu\]"):
        call(*inputs)


@pytest.mark.parametrize(
    ("device", "dtype", "t", "r", "chosen"),
    [
        ("cuda", torch.float32, 2, 128, "triton"),
        ("cuda", torch.bfloat16, 2, 1, "triton"),
        ("cuda", torch.float64, 2, 1, "block"),
        ("cuda", torch.float32, 2, 129, "block"),
        ("cuda", torch.float32, 1, 1, "recurrent"),
        ("cpu", torch.float32, 2, 1, "block" if native.kernels() is None else "native"),
        ("cpu", torch.float64, 2, 1, "block"),
    ],
)
def test_auto_takes_triton_on_a_gpu_only(device: str, dtype: torch.dtype, t: int, r: int, chosen: str) -> None:
    with FakeTensorMode():
        q, k, v = (torch.empty(1, t, size, device=device, dtype=dtype) for size in (r, r, 4))
        assert decay._automatic_backend(q, k, v) == chosen


def test_auto_without_triton_is_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decay, "TRITON_INSTALLED", False)
    with FakeTensorMode():
        q, k, v = (torch.empty(1, 2, 4, device="cuda") for _ in range(3))
        assert decay._automatic_backend(q, k, v) == "block"


@on_gpu
@pytest.mark.parametrize("shape", [(4, 4096, 4, 64), (2, 4096, 32, 128), (1, 3000, 64, 512), (1, 1500, 128, 2048)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 1e-2)])
def test_it_is_the_definition_at_full_size(shape: Shape, dtype: torch.dtype, tolerance: float) -> None:
    exact = make_inputs(shape, decays(shape[2], 0.01), torch.float32)
    inputs = [x.to(dtype) for x in exact[:3]] + exact[3:]
    results = run_triton(inputs)
    assert_same(results, run_definition(inputs, "block"), tolerance)
    assert_same(run_triton(inputs), results, 0.0)
