"""Norms as layers: parameters and roles, how DyT and Derf begin, and that every block gives what its parts give."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from kmixer.errors import InputError
from kmixer.layers import K0, K1, K2, Derf, DyT, RMSNorm
from kmixer.layers.norms import PointwiseNorm, UnweightedRMSNorm
from kmixer.layers.roles import BIAS, NORM, roles_of

pointwise = pytest.mark.parametrize("kind", [DyT, Derf])


@pytest.mark.parametrize(
    ("norm", "shapes"),
    [
        (RMSNorm(6), {"weight": (6,)}),
        (UnweightedRMSNorm(), {}),
        (DyT(6), {"alpha": (), "gain": (6,)}),
        (DyT(6, gain=False), {"alpha": ()}),
        (DyT(6, bias=True), {"alpha": (), "gain": (6,), "bias": (6,)}),
        (Derf(6), {"alpha": (), "shift": (), "gain": (6,)}),
        (Derf(6, gain=False, bias=False), {"alpha": (), "shift": ()}),
    ],
)
def test_parameters_and_roles(norm: nn.Module, shapes: dict[str, tuple[int, ...]]) -> None:
    assert {name: tuple(parameter.shape) for name, parameter in norm.named_parameters()} == shapes
    assert roles_of(norm) == {name: BIAS if name == "bias" else NORM for name in shapes}


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.nan, math.inf])
def test_an_alpha_is_above_zero(alpha: float) -> None:
    with pytest.raises(InputError, match=r"alpha: got .*; allowed: above 0"):
        DyT(4, alpha)


def test_they_are_their_formulas() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    dyt, derf = DyT(6, 0.7, bias=True).double(), Derf(6, 0.7, bias=True).double()
    for norm in (dyt, derf):
        for parameter in norm.parameters():
            nn.init.normal_(parameter)
    assert derf.shift is not None
    torch.testing.assert_close(dyt(x), dyt.gain * torch.tanh(dyt.alpha * x) + dyt.bias)
    torch.testing.assert_close(derf(x), derf.gain * torch.erf(derf.alpha * x + derf.shift) + derf.bias)


@pointwise
@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_matched_to_an_input_it_gives_out_one(kind: type[PointwiseNorm], scale: float) -> None:
    torch.manual_seed(0)
    x = scale * torch.randn(4, 50, 32)
    norm = kind(32, 0.3, bias=True)
    with torch.no_grad():
        norm.bias.fill_(0.0)
    norm.match(x)
    assert norm.alpha.item() * float(x.square().mean().sqrt()) == pytest.approx(0.3, rel=1e-5)
    assert norm(x).square().mean().item() == pytest.approx(1, rel=1e-4)
    before = [parameter.clone() for parameter in norm.parameters()]
    norm.match(x)  # goes by where alpha began, not by where it is
    assert all(torch.equal(a, b) for a, b in zip(before, norm.parameters(), strict=True))


@pointwise
def test_an_input_of_zeros_cannot_be_matched(kind: type[PointwiseNorm]) -> None:
    with pytest.raises(InputError, match=r"root mean square 0\.0; allowed: above 0"):
        kind(4).match(torch.zeros(2, 4))


def blocks(kind: type[PointwiseNorm], *, bias: bool) -> list[nn.Module]:
    def norms() -> tuple[nn.Module, nn.Module]:
        return kind(16, 0.9, bias=bias), kind(16, 1.1, bias=bias)

    torch.manual_seed(1)
    return [
        K1(16, norms=norms()),
        K2(16, 3, norms=norms()),
        K0(16, kind(16, gain=False)),
        K0(16, kind(16, bias=bias)),
    ]


def by_hand(block: nn.Module, x: Tensor) -> Tensor:
    if isinstance(block, K0):
        return x + block.gain * block.norm(x) + block.bias
    assert isinstance(block, K1 | K2)
    x = x + block.mixer(block.mixing_norm(x))[0]
    return x + block.feed_forward(block.feed_forward_norm(x))  # type: ignore[operator,no-any-return]


@pointwise
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 2e-5), (torch.float64, 1e-12)])
def test_blocks_give_what_their_parts_give(
    kind: type[PointwiseNorm], bias: bool, dtype: torch.dtype, error: float
) -> None:
    for block in blocks(kind, bias=bias):
        for parameter in block.parameters():
            nn.init.normal_(parameter, mean=0.2, std=0.3)
        block, x = block.to(dtype), torch.randn(2, 50, 16, dtype=dtype)
        given = block(x)
        mine, theirs = (given[0] if isinstance(given, tuple) else given), by_hand(block, x)
        torch.testing.assert_close(mine, theirs, rtol=error, atol=error)
        parameters = [parameter for parameter in block.parameters() if parameter.requires_grad]
        gradients = [torch.autograd.grad(y.sin().sum(), parameters, retain_graph=True) for y in (mine, theirs)]
        for actual, expected in zip(*gradients, strict=True):
            scale = 1 + expected.abs().max().item()
            assert (actual - expected).abs().max().item() <= 10 * error * scale
