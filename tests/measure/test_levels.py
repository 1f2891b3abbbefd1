"""Symmetric and antisymmetric parts, eigenvalues and kurtosis, where the answer is known."""

from __future__ import annotations

import pytest
import torch

from kmixer.layers import HierarchicalAttention
from kmixer.measure.dynamics import measure_dynamics
from kmixer.measure.levels import approximation, mardia_kurtosis, measure_levels, symmetric_part
from kmixer.models import CausalLM, TransformerConfig


def test_the_two_parts_are_orthogonal_and_their_energies_add_up() -> None:
    torch.manual_seed(0)
    scores = torch.randn(3, 2, 7, 7, dtype=torch.float64)
    symmetric, anti = (scores + scores.mT) / 2, (scores - scores.mT) / 2
    torch.testing.assert_close((symmetric * anti).sum((2, 3)), torch.zeros(3, 2, dtype=torch.float64))
    shares = torch.tensor(symmetric_part(scores))
    rest = anti.square().sum((0, 2, 3)) / scores.square().sum((0, 2, 3))
    torch.testing.assert_close(shares + rest.to(shares.dtype), torch.ones(2))
    assert symmetric_part(symmetric) == pytest.approx([1, 1])
    assert symmetric_part(anti) == pytest.approx([0, 0])
    assert symmetric_part(torch.zeros(1, 1, 3, 3)) == [1.0]


def test_equal_queries_and_keys_are_reciprocal_and_positive() -> None:
    torch.manual_seed(0)
    layer = HierarchicalAttention(12, 2, levels=3, rotary=False).double()
    x = torch.randn(4, 40, 12, dtype=torch.float64)
    free = measure_levels(layer, x)
    assert all(0 < share < 1 for heads in free["reciprocity"] for share in heads)
    assert all(value < 0 for heads in free["smallest_eigenvalue"] for value in heads)
    with torch.no_grad():
        for projection in layer.query_key_value:
            projection.weight[12:24] = projection.weight[:12]
    tied = measure_levels(layer, x)
    assert [len(tied[key]) for key in ("reciprocity", "smallest_eigenvalue", "kurtosis")] == [3, 3, 3]
    for heads in tied["reciprocity"]:
        assert heads == pytest.approx([1, 1])
    for heads in tied["smallest_eigenvalue"]:
        assert min(heads) > -1e-12


def test_kurtosis_tells_normal_from_other_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(20_000, 5, generator=generator, dtype=torch.float64)
    mixed = normal @ torch.randn(5, 5, generator=generator, dtype=torch.float64) + 3
    assert mardia_kurtosis(normal) == pytest.approx(1, abs=0.03)
    assert mardia_kurtosis(mixed) == pytest.approx(mardia_kurtosis(normal), abs=1e-9)  # linear maps change nothing
    assert mardia_kurtosis(torch.cat([mixed, mixed[:, :1]], dim=1)) == pytest.approx(mardia_kurtosis(mixed), rel=1e-6)
    assert mardia_kurtosis(torch.rand(20_000, 5, generator=generator, dtype=torch.float64)) < 0.9
    assert mardia_kurtosis(normal**3) > 2


def test_one_level_is_full_attention_and_coarse_levels_are_not() -> None:
    torch.manual_seed(0)
    layer = HierarchicalAttention(12, 2, levels=3, rotary=False).double()
    for projection in layer.query_key_value:
        torch.nn.init.normal_(projection.weight)
    x = torch.randn(2, 40, 12, dtype=torch.float64)
    found = measure_levels(layer, x)
    assert found["fit_error"][0] == pytest.approx([0, 0], abs=1e-6)
    assert all(0.1 < error < 1 for heads in found["fit_error"][1:] for error in heads)
    first, second, last = found["remainder"]
    assert last == pytest.approx([0, 0], abs=1e-12)
    assert all(a > b > 0 for a, b in zip(first, second, strict=True))
    assert measure_levels(layer, x[:, :12])["fit_error"] == [[], [], []]  # every matrix is a fit


def test_the_best_fit_is_the_least_squares_solution() -> None:
    torch.manual_seed(0)
    x, scores = torch.randn(1, 9, 3, dtype=torch.float64), torch.randn(1, 1, 9, 9, dtype=torch.float64)
    design = torch.einsum("ia,jb->ijab", x[0], x[0]).reshape(81, 9)
    residual = scores.reshape(81) - design @ torch.linalg.lstsq(design, scores.reshape(81)).solution
    found = approximation([scores], x)
    assert found["fit_error"][0] == pytest.approx([float(residual.norm() / scores.norm())])


def test_dynamics_hold_the_levels() -> None:
    torch.manual_seed(0)
    config = TransformerConfig(width=16, layers=2, heads=2, mixers=("hierarchical",))
    found = measure_dynamics(CausalLM(config, 30), torch.randint(30, (3, 40)))
    assert torch.tensor(found["level_weights"]).shape == (2, 2, 3)
    assert [len(layer["reciprocity"]) for layer in found["levels"]] == [3, 3]
    assert [len(layer) for layer in found["locality"]["distance"]] == [2, 2]
