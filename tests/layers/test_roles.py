"""Modules say the roles of their parameters; what nobody says is an error."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kmixer.errors import InputError
from kmixer.layers.roles import BIAS, EMBEDDING, LOGIT, MATRIX, NORM, TABLE, Role, roles_of


class Scale(nn.Module):
    """A parameter whose name says nothing, and one that nobody speaks of."""

    def __init__(self, silent: bool = False) -> None:
        super().__init__()
        self.norm_kernel_logit = nn.Parameter(torch.ones(3, 3))
        self.more = nn.Parameter(torch.ones(3)) if silent else None

    def roles(self) -> dict[str, Role]:
        return {"norm_kernel_logit": MATRIX}


class Outer(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.map = nn.Linear(3, 3)
        self.inner = inner

    def roles(self) -> dict[str, Role]:
        return {"map.weight": TABLE}


def test_names_say_nothing_and_what_is_around_counts() -> None:
    model = nn.Sequential(Outer(Scale()), nn.Embedding(4, 3), nn.LayerNorm(3), nn.Linear(3, 2, bias=False))
    assert roles_of(model) == {
        "0.map.weight": TABLE,
        "0.map.bias": BIAS,
        "0.inner.norm_kernel_logit": MATRIX,
        "1.weight": EMBEDDING,
        "2.weight": NORM,
        "2.bias": BIAS,
        "3.weight": MATRIX,
    }


def test_a_parameter_without_a_role_is_named() -> None:
    with pytest.raises(InputError, match=r"parameter inner.more: no role is said for it; Scale.roles\(\) must name"):
        roles_of(Outer(Scale(silent=True)))
    with pytest.raises(InputError, match=r"parameter 0.weight: no role is said for it; Conv1d.roles\(\) must name"):
        roles_of(nn.Sequential(nn.Conv1d(2, 2, 3)))


def test_a_class_derived_from_one_of_torchs_speaks_for_itself() -> None:
    class Scaled(nn.Linear):
        """Another function of its weights: that of `nn.Linear` would be a guess."""

    with pytest.raises(InputError, match=r"Scaled.roles\(\) must name weight"):
        roles_of(nn.Sequential(Scaled(2, 2)))


def test_a_role_without_a_parameter_is_an_error() -> None:
    class Stale(nn.Module):
        def roles(self) -> dict[str, Role]:
            return {"gone": LOGIT}

    with pytest.raises(InputError, match=r"Stale.roles\(\) says a role for gone, which is no parameter of it"):
        roles_of(Stale())
