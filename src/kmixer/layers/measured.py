"""What can be measured of a layer: small protocols that a layer offers and `kmixer.measure` asks for.

A layer offers a protocol by having its methods; nothing is registered, and `kmixer.measure` names no layer.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Learned(Protocol):
    """Has learned values that are worth recording."""

    def learned(self) -> dict[str, Any]:
        """A number or list of numbers for each name; a record has a list of them, one per layer, under that name."""


@runtime_checkable
class Attention(Protocol):
    """Gives every position a weighted mean of values of positions."""

    def attention_weights(self, x: Tensor) -> Tensor | None:
        """The weights (b, h, t, t) for inputs (b, t, d), all in memory; None where a setting leaves it no such weights.

        Row i of a head is what position i takes of every position.
        """


@runtime_checkable
class TwoBranches(Protocol):
    """Mixes in two ways, whose outputs it adds: a base kernel, and another."""

    def branch_energies(self, x: Tensor, state: Any, *extra: Any) -> tuple[float, float] | None:
        """Sums of squares of what the base kernel and the other way make of the arguments of `forward`.

        None without a base kernel.
        """


@runtime_checkable
class Columns(Protocol):
    """Attention that brings what all positions take of one nearer to 1."""

    def column_residual(self, x: Tensor) -> float:
        """max_j |sum_i W_ij - 1| for inputs (b, t, d), mean over heads."""


class LevelScores(NamedTuple):
    """One level of an attention that scores at several resolutions; level l has a row for 2^l positions."""

    rows: Tensor  # (b, n, d), what queries and keys are made of
    scores: Tensor  # (b, h, n, n) of every query with every key, unmasked
    weight: Tensor  # (h,), what the level's scores are multiplied by before they are added
    forms: Tensor  # (h, d, d), W_Q W_K^T


@runtime_checkable
class Levels(Protocol):
    """Attention that adds scores of several resolutions."""

    def score_levels(self, x: Tensor) -> list[LevelScores]:
        """Its levels for inputs (b, t, d), the finest first."""


class FixedMixing(NamedTuple):
    """A mixing that does not depend on its inputs: y = O A V x, with the matrices O and V over the channels."""

    weights: Tensor  # A (t, t): row i is what position i takes of each
    strength: float  # the product of `strength` of O and of V


@runtime_checkable
class MixesFixed(Protocol):
    """Mixes, at its initialisation at least, by a matrix that does not depend on its inputs."""

    def fixed_mixing(self, t: int) -> FixedMixing | None:
        """That mixing of t positions; None where a setting leaves it none."""


def strength(weight: Tensor) -> float:
    """fan_in times the mean square of the entries of a matrix (outputs, inputs): what it does to a variance."""
    return float(weight.detach().double().square().mean()) * weight.shape[1]
