"""Compiled kernels get ordinary tensors that they know, and nothing else: whatever follows the operators sees them."""

from __future__ import annotations

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from kmixer import native
from kmixer.ops.linear import linear_map


class Subclass(Tensor):
    pass


class Weight(torch.nn.Parameter):
    pass


def test_ordinary_tensors_are_plain() -> None:
    x = torch.randn(3, 4)
    with torch.inference_mode():
        inference = torch.randn(3)
    ordinary = [x, x.T, x[::2], torch.nn.Parameter(x), x.requires_grad_() * 2, x.detach(), inference, x.expand(2, 3, 4)]
    for tensor in ordinary:
        assert native.plain(tensor)
        assert native.usable(tensor) == (native.kernels() is not None)


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:torch.ao.quantization", "ignore:.*quantize")
def test_others_go_the_plain_way() -> None:
    x = torch.randn(3, 4)
    complex_ = torch.randn(3, dtype=torch.complex64)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
    negated = torch.imag(complex_.conj())
    assert negated.is_neg()
    others = {
        "device": x.to("meta"),
        "subclass": x.as_subclass(Subclass),
        "parameter subclass": Weight(x),
        "fake": fake,
        "sparse": x.to_sparse(),
        "compressed": x.to_sparse_csr(),
        "mkldnn": x.to_mkldnn(),
        "negated": negated,
        "quantised": torch.quantize_per_tensor(x, 0.1, 0, torch.quint8),
        "zeros": torch._efficientzerotensor((3,)),
    }
    for name, tensor in others.items():
        assert not native.plain(tensor), name
        assert not native.usable(tensor), name
    assert not native.usable(x.double())
    assert not native.usable(x, x.double(), dtypes=(torch.float32,))


def test_others_that_follow_see_the_operators() -> None:
    x = torch.randn(3, 4)
    asked: list[bool] = []

    def ask(z: Tensor) -> Tensor:
        asked.append(native.usable(z) or native.usable(x))
        return z.sum()

    torch.func.vmap(ask)(x)
    torch.func.grad(ask)(x)
    torch.func.jvp(ask, (x,), (x,))
    with pytest.warns(DeprecationWarning, match="torch.jit.trace"):
        torch.jit.trace(ask, x, check_trace=False)
    torch.compile(ask, backend="eager")(x)
    with FlopCounterMode(display=False):
        ask(x)
    with forward_ad.dual_level():
        ask_dual = forward_ad.make_dual(x, x)
        asked.append(native.usable(ask_dual))
        assert native.usable(x) == (native.kernels() is not None)
    assert asked
    assert not any(asked)


def test_autocast_is_asked() -> None:
    x = torch.randn(3, 4)
    built = native.kernels() is not None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert native.usable(x) == built
        assert not native.usable(x, products=True)
    with torch.autocast("cpu", dtype=torch.float16):
        assert not native.usable(x)
    assert native.usable(x, products=True) == built


def test_flops_are_counted() -> None:
    with FlopCounterMode(display=False) as counter:
        linear_map(torch.randn(3, 4), torch.randn(5, 4))
    assert counter.get_total_flops() == 2 * 3 * 4 * 5


def test_gradients_that_stand_for_negated_numbers_are_read_right() -> None:
    x, weight = torch.randn(3, 4), torch.randn(5, 4)
    gradient = torch.imag(torch.randn(3, 5, dtype=torch.complex64).conj())
    assert gradient.is_neg()
    results = []
    for dtype in (torch.float32, torch.float64):
        leaf = x.to(dtype).requires_grad_()
        results.append(torch.autograd.grad(linear_map(leaf, weight.to(dtype)), leaf, gradient.to(dtype))[0].double())
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)
