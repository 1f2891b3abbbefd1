"""The operators inside mixers, for `kmixer bench mixer`: a file for each mixer whose own can be computed many ways.

A file has the mixer's name and an `OPERATOR`. A mixer without one is timed as a layer and in a block.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

from torch import Tensor

# What is computed of the inputs: (inputs, causal, window) to outputs (b, h, t, e).
Way = Callable[[list[Tensor], bool, int | None], Tensor]


class Operator(NamedTuple):
    """An operator as it is timed."""

    inputs: Callable[[int, int, int, int], list[Tensor]]  # of b, h, t, e; random, float32, with gradients
    ways: dict[str, Way]  # the first is the definition; one that cannot run here raises InputError


def operator_of(mixer: str) -> Operator | None:
    """The operator of a mixer; None where it has no file here."""
    name = f"{__name__}.{mixer}"
    if find_spec(name) is None:
        return None
    operator: Operator = import_module(name).OPERATOR
    return operator
