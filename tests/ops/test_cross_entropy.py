"""Cross-entropies of logits: the compiled path is the definition, with a soft cap and without."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kmixer import native
from kmixer.errors import InputError
from kmixer.ops.cross_entropy import cross_entropies, soft_capped

pytestmark = pytest.mark.skipif(native.kernels() is None, reason="the compiled kernels were not built")

caps = st.sampled_from([None, 1.0, 15.0])


def results(logits: Tensor, targets: Tensor, cap: float | None, dtype: torch.dtype) -> list[Tensor]:
    leaf = logits.detach().clone().to(dtype).requires_grad_()
    losses = cross_entropies(leaf, targets, cap)
    (losses * torch.cos(torch.arange(losses.numel())).view(losses.shape)).sum().backward()
    assert leaf.grad is not None
    return [losses.detach().double(), leaf.grad.double()]


@given(st.tuples(st.integers(1, 3), st.integers(1, 20)), st.integers(1, 90), st.floats(0.01, 100), caps)
def test_the_compiled_path_is_the_definition(rows: tuple[int, int], v: int, scale: float, cap: float | None) -> None:
    """In float32 the compiled path runs, in float64 the definition."""
    generator = torch.Generator().manual_seed(v)
    logits = scale * torch.randn(*rows, v, generator=generator)
    targets = torch.randint(v, rows, generator=generator)
    found, exact = (results(logits, targets, cap, dtype) for dtype in (torch.float32, torch.float64))
    largest = 1 + soft_capped(logits, cap).abs().max().item()
    for actual, expected in zip(found, exact, strict=True):
        assert (actual - expected).abs().max().item() <= 1e-6 * largest


def test_logits_of_any_size_and_none_that_is_not_a_number() -> None:
    logits = torch.tensor([[-1e4, 0.0, 1e4], [3e38, -3e38, 0.0], [0.0, -torch.inf, 1.0]], requires_grad=True)
    targets = torch.tensor([0, 0, 2])
    losses = cross_entropies(logits, targets)
    torch.testing.assert_close(losses, F.cross_entropy(logits, targets, reduction="none"))
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    assert gradient.isfinite().all()
    for wrong in (torch.nan, torch.inf):
        for cap in (None, 15.0) if wrong != torch.inf else (None,):
            assert not cross_entropies(torch.tensor([[0.0] * 20 + [wrong]]), torch.tensor([3]), cap).isfinite().any()


def test_16_bit_logits_are_capped_and_summed_in_float32() -> None:
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = torch.tensor([0, 7, 39])
    expected = F.cross_entropy(soft_capped(logits.float(), 2.0), targets, reduction="none")
    torch.testing.assert_close(cross_entropies(logits, targets, 2.0), expected)


def test_targets_are_in_the_vocabulary_and_may_be_none_at_all() -> None:
    for targets in ([0, 5], [-1, 0]):
        with pytest.raises(InputError, match=r"allowed: 0\.\.4"):
            cross_entropies(torch.zeros(2, 5), torch.tensor(targets))
    assert cross_entropies(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64)).shape == (0,)
