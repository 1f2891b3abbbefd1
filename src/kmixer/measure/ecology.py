"""What a predictor must keep apart: the cost of giving several sources of text one encoding.

World states w with prior pi, contexts c with marginal D, laws P_w(. | c); an encoding is a partition of the states into
cells x, and what it predicts is the mean law of a cell, P_x = sum_w alpha_w P_w with alpha_w = pi_w / pi_x. In nats:

    L(partition)      = sum_x pi_x E_c H(P_x)                             the least loss with this encoding
    excess(partition) = L - H(Y | C, W) = E_c sum_x pi_x JS_alpha({P_w}, w in x)
    complexity        = H(cell)                                           J_beta = L + beta complexity
    merging A and B   : J_beta changes by pi_S (E_c JS_lambda(P_A, P_B) - beta h(lambda)), lambda = pi_A / pi_S, of
                        their union S, so that one cell is better from beta* = E_c JS_lambda / h(lambda) on

The excess is zero where every cell holds equal laws alone; the coarsest partition of these is the quotient. A cell that
holds w and w' has an excess of (pi_w + pi_w') E_c JS_lambda(P_w, P_w') at least, under any other marginal too.

Everything comes from one number for every set of states, pi_S E_c H(P_S). Sets are masks: w is in S where bit w is set.

Source: Dalla Riva 2026 (arXiv 2604.05469).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Numbers = npt.NDArray[np.float64]
Masks = npt.NDArray[np.int64]
# The loss of sets of states (n,), pi_S E_c H(P_S).
Losses = Callable[[Masks], Numbers]

# States whose partitions are all looked at: 4,140 of 8.
ENUMERATED = 8
# Numbers of a table that is made at once.
TABLE = 1 << 22
# Losses that differ by less are the same: rounding of sums over contexts.
ROUNDING = 1e-12


class Merge(NamedTuple):
    """From `beta` on this partition has the least J_beta, until the next one."""

    beta: float
    cells: tuple[int, ...]  # masks, in the order of their first states
    excess: float
    complexity: float


def set_losses(laws: Tensor, marginal: Tensor, prior: Numbers, masks: Masks) -> Numbers:
    """pi_S E_c H(P_S) (n,) of these sets: laws (w, c, v), marginal (c,), prior (w,); in float64."""
    w, contexts, v = laws.shape
    members = members_of(masks, w) * prior
    mass = members.sum(1)
    alpha = torch.from_numpy(members / mass[:, None])
    entropies = torch.zeros(len(masks), dtype=torch.float64)
    size = max(1, TABLE // (len(masks) * v))
    for first in range(0, contexts, size):
        part = slice(first, first + size)
        mixed = (alpha @ laws[:, part].double().flatten(1)).view(len(masks), -1, v)
        entropies -= torch.xlogy(mixed, mixed).sum(-1) @ marginal[part].double()
    return mass * entropies.numpy()


def losses_of(laws: Tensor, marginal: Tensor, prior: Numbers) -> Losses:
    """Those of one ecology, each computed when it is asked for."""
    return lambda masks: set_losses(laws, marginal, prior, masks)


def members_of(masks: Masks, w: int) -> npt.NDArray[np.bool_]:
    """Which states are in which set (n, w)."""
    return (masks[:, None] >> np.arange(w) & 1).astype(bool)


def singles(w: int) -> Masks:
    """The sets of one state."""
    return np.left_shift(1, np.arange(w))


@cache
def partitions(w: int) -> Masks:
    """All partitions of w states (n, w): the masks of their cells, and 0 where there are fewer cells."""
    labels = np.zeros((1, 1), dtype=np.int64)
    for _ in range(1, w):  # a state joins a cell that there is, or begins the next one
        choices = np.arange(labels.shape[1] + 1)
        rows, chosen = np.nonzero(choices <= labels.max(1, keepdims=True) + 1)
        labels = np.concatenate([labels[rows], chosen[:, None]], axis=1)
    return ((labels[:, None] == np.arange(w)[:, None]) * singles(w)).sum(2)


def losses_and_complexities(losses: Losses, prior: Numbers) -> tuple[Numbers, Numbers]:
    """L and H(cell) (n,) of all partitions, in the order of `partitions`."""
    w = len(prior)
    of_sets = np.concatenate([[0.0], losses(np.arange(1, 1 << w))])
    mass = members_of(np.arange(1 << w), w) @ prior
    surprise = np.zeros_like(mass)
    surprise[1:] = -mass[1:] * np.log(mass[1:])
    cells = partitions(w)
    return of_sets[cells].sum(1), surprise[cells].sum(1)


def path_over_beta(losses: Losses, prior: Numbers) -> list[Merge]:
    """The partitions that are best for some beta, from beta = 0, where it is the quotient, up to one cell.

    All partitions are looked at: a step of the path may change more than one merge.
    """
    loss, complexity = losses_and_complexities(losses, prior)
    cells, least = partitions(len(prior)), loss.min()
    best = np.flatnonzero(loss <= least + ROUNDING)
    now, beta = int(best[complexity[best].argmin()]), 0.0
    path = [_merge(0.0, cells[now], loss[now] - least, complexity[now])]
    while complexity[now] > ROUNDING:
        simpler = np.flatnonzero(complexity < complexity[now] - ROUNDING)
        slopes = (loss[simpler] - loss[now]) / (complexity[now] - complexity[simpler])
        beta = max(beta, float(slopes.min()))
        ties = simpler[slopes <= slopes.min() + ROUNDING]
        now = int(ties[complexity[ties].argmin()])
        path.append(_merge(beta, cells[now], loss[now] - least, complexity[now]))
    return path


def greedy_path(losses: Losses, prior: Numbers) -> list[Merge]:
    """What single merges give, each the one with the least beta*; for more states than can be enumerated."""
    w, base = len(prior), losses(singles(len(prior))).sum()
    cells = [int(mask) for mask in singles(w)]
    path, beta = [_merge(0.0, np.array(cells), 0.0, _entropy(cells, prior))], 0.0
    while len(cells) > 1:
        pairs = np.array([(a, b) for i, a in enumerate(cells) for b in cells[i + 1 :]])
        thresholds = merge_thresholds(losses, prior, pairs)
        a, b = pairs[thresholds.argmin()].tolist()
        beta = max(beta, float(thresholds.min()))
        cells = sorted([cell for cell in cells if cell not in (a, b)] + [a | b], key=_first)
        excess = float(losses(np.array(cells)).sum() - base)
        path.append(_merge(beta, np.array(cells), excess, _entropy(cells, prior)))
    return path


def divergences(losses: Losses, prior: Numbers, pairs: Masks) -> Numbers:
    """E_c JS_lambda(P_A, P_B) (n,) of pairs (n, 2) of cells that share no state."""
    mass = members_of(pairs.sum(1), len(prior)) @ prior
    whole, parts = losses(pairs.sum(1)), losses(pairs.ravel()).reshape(-1, 2).sum(1)
    return (whole - parts) / mass


def merge_thresholds(losses: Losses, prior: Numbers, pairs: Masks) -> Numbers:
    """beta* (n,) of pairs (n, 2) of cells: from there on one cell is better."""
    return divergences(losses, prior, pairs) / binary_entropy(_shares(prior, pairs))


def merge_gain(losses: Losses, prior: Numbers, pairs: Masks, beta: float) -> Numbers:
    """J_beta of one cell less that of two (n,): negative where merging gains."""
    mass = members_of(pairs.sum(1), len(prior)) @ prior
    return mass * (divergences(losses, prior, pairs) - beta * binary_entropy(_shares(prior, pairs)))


def binary_entropy(share: Numbers) -> Numbers:
    """h of shares strictly between 0 and 1."""
    return -(share * np.log(share) + (1 - share) * np.log1p(-share))


def quotient(laws: Tensor, marginal: Tensor) -> tuple[int, ...]:
    """The cells of equal laws, in contexts that occur."""
    distances = task_distances(laws, marginal)
    cells = {sum(1 << int(other) for other in torch.nonzero(row <= ROUNDING)) for row in distances}
    return tuple(sorted(cells, key=_first))


def task_distances(laws: Tensor, marginal: Tensor) -> Tensor:
    """sigma^2 (w, w): the mean over contexts of the squared Hellinger distance, 1 - sum_y sqrt(P_w P_w').

    It needs no prior, and is linear in the marginal: in a mixture of ecologies it is the mean of theirs.
    """
    difference = laws.double().sqrt()[:, None] - laws.double().sqrt()[None]
    return difference.square().sum(-1) @ marginal.double() / 2


def rescued_at(threshold: float, first: float, second: float) -> float:
    """The share alpha of a second ecology from which sigma^2 of a mixture is above a threshold.

    `first` and `second` are the sigma^2 of both; infinite where the second has no more than the first.
    """
    if threshold <= first:
        return 0.0
    return (threshold - first) / (second - first) if second > first else math.inf


def states_in(mask: int) -> Iterator[int]:
    """The states of a set, in their order."""
    return (w for w in range(mask.bit_length()) if mask >> w & 1)


def _merge(beta: float, cells: Masks, excess: float, complexity: float) -> Merge:
    chosen = sorted((int(cell) for cell in cells if cell), key=_first)
    return Merge(beta, tuple(chosen), max(0.0, float(excess)), float(complexity))


def _first(mask: int) -> int:
    return mask & -mask


def _shares(prior: Numbers, pairs: Masks) -> Numbers:
    first, second = (members_of(part, len(prior)) @ prior for part in pairs.T)
    share: Numbers = first / (first + second)
    return share


def _entropy(cells: list[int], prior: Numbers) -> float:
    mass = members_of(np.array(cells), len(prior)) @ prior
    return float(-(mass * np.log(mass)).sum())
