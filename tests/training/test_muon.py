"""Muon in batches is torch's Muon, but for the precision of its products."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import Muon as OneByOneMuon

from kmixer.layers.roles import Matrix
from kmixer.training.muon import Muon, orthogonalize

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def parameters(seed: int) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(8, 8), (16, 8), (8, 16), (8, 8), (1, 5)]
    return [nn.Parameter(torch.randn(*shape, generator=generator)) for shape in shapes]


def plain(ours: list[nn.Parameter]) -> dict[nn.Parameter, Matrix]:
    """As torch reads them: rows are outputs, one matrix each."""
    return dict.fromkeys(ours, Matrix())


def give_gradients(ours: list[nn.Parameter], step: int) -> None:
    for number, parameter in enumerate(ours):
        generator = torch.Generator().manual_seed(100 * step + number)
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_it_is_torchs_to_the_rounding_of_bfloat16() -> None:
    ours, theirs = parameters(0), parameters(0)
    settings = {"lr": 0.1, "weight_decay": 0.3, "momentum": 0.9}
    batched, one_by_one = Muon(plain(ours), **settings), OneByOneMuon(theirs, **settings)
    for step in range(4):
        for optimizer, own in ((batched, ours), (one_by_one, theirs)):
            give_gradients(own, step)
            optimizer.step()
    for mine, torchs, start in zip(ours, theirs, parameters(0), strict=True):
        moved = (torchs - start).abs().max().item()
        assert moved > 0.1
        assert (mine - torchs).abs().max().item() < 0.03 * moved
    for mine, torchs in zip(ours, theirs, strict=True):
        momentum = batched.state[mine]["momentum_buffer"], one_by_one.state[torchs]["momentum_buffer"]
        torch.testing.assert_close(*momentum)


def test_a_parameter_without_gradient_stays() -> None:
    ours = parameters(1)
    give_gradients(ours, 0)
    ours[0].grad = None
    Muon(plain(ours), lr=0.1).step()
    changed = [not torch.equal(a, b) for a, b in zip(ours, parameters(1), strict=True)]
    assert changed == [False, True, True, True, True]


def test_it_resumes() -> None:
    def train(own: list[nn.Parameter], optimizer: Muon, steps: range) -> None:
        for step in steps:
            give_gradients(own, step)
            optimizer.step()

    whole, first = parameters(2), parameters(2)
    train(whole, Muon(plain(whole), lr=0.1), range(6))
    half = Muon(plain(first), lr=0.1)
    train(first, half, range(3))
    second = [nn.Parameter(p.detach().clone()) for p in first]
    resumed = Muon(plain(second), lr=0.5)
    resumed.load_state_dict(half.state_dict())
    train(second, resumed, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(whole, second, strict=True))


@pytest.mark.parametrize(("rows", "columns"), [(64, 4), (4, 64), (8, 8)])
def test_a_matrix_that_is_stored_the_other_way_takes_the_same_step(rows: int, columns: int) -> None:
    """(in, out), used as x W, moves as its transpose (out, in) does: the factor is that of out and in."""
    generator = torch.Generator().manual_seed(4)
    start, gradient = (torch.randn(rows, columns, generator=generator) for _ in range(2))
    usual, other = nn.Parameter(start.clone()), nn.Parameter(start.mT.contiguous())
    usual.grad, other.grad = gradient, gradient.mT.contiguous()
    Muon({usual: Matrix()}, lr=0.1, weight_decay=0.0).step()
    Muon({other: Matrix(outputs=1)}, lr=0.1, weight_decay=0.0).step()
    torch.testing.assert_close(other.mT, usual)
    size = torch.linalg.svdvals((usual - start).detach()).mean() / (0.1 * max(1.0, rows / columns) ** 0.5)
    assert size == pytest.approx(0.95, abs=0.25)


@pytest.mark.parametrize("outputs", [0, 1])
def test_matrices_side_by_side_step_as_they_do_apart(outputs: int) -> None:
    generator = torch.Generator().manual_seed(5)
    apart = [nn.Parameter(torch.randn(*((8, 6) if outputs == 0 else (6, 8)), generator=generator)) for _ in range(3)]
    for parameter in apart:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    together = nn.Parameter(torch.cat([parameter.detach() for parameter in apart], dim=outputs))
    together.grad = torch.cat([parameter.grad for parameter in apart if parameter.grad is not None], dim=outputs)
    Muon(dict.fromkeys(apart, Matrix(outputs)), lr=0.1).step()
    Muon({together: Matrix(outputs, parts=3)}, lr=0.1).step()
    torch.testing.assert_close(together, torch.cat(apart, dim=outputs))


@pytest.mark.parametrize("shape", [(3, 12, 12), (2, 30, 7), (1, 7, 30), (4, 1, 5)])
def test_directions_stay_and_sizes_go_to_one(shape: tuple[int, int, int]) -> None:
    matrices = torch.randn(*shape, generator=torch.Generator().manual_seed(3))
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    inside = left.mT @ orthogonalize(matrices, COEFFICIENTS, 5) @ right.mT
    sizes = torch.diagonal(inside, dim1=1, dim2=2)
    torch.testing.assert_close(inside, torch.diag_embed(sizes), atol=1e-4, rtol=0)
    assert sizes.min() > 0.3
    assert sizes.max() < 1.3


@given(st.floats(1e-3, 1e3), st.integers(1, 9), st.integers(1, 9))
def test_the_scale_of_a_matrix_does_not_matter(scale: float, rows: int, columns: int) -> None:
    matrices: Tensor = torch.randn(2, rows, columns, generator=torch.Generator().manual_seed(rows * columns))
    expected = orthogonalize(matrices, COEFFICIENTS, 5)
    torch.testing.assert_close(orthogonalize(scale * matrices, COEFFICIENTS, 5), expected, atol=1e-3, rtol=0)
