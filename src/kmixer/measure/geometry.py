"""What perturbing inputs does to their representations: distances between two sets of vectors, and those by chance.

X, Y (N, d) centred and of Frobenius norm 1:

    D     = min over rotations Q of |X Q - Y|_F / sqrt 2 = sqrt(1 - |X^T Y|_*)     Procrustes, with the nuclear norm
    CKA   = HSIC(X, Y) / sqrt(HSIC(X, X) HSIC(Y, Y))                               linear, by the unbiased HSIC
    rank  = (sum s^2)^2 / sum s^4 of the singular values of X                      participation ratio
    D_k   = D of both on the first k principal directions of X, each divided by its deviation in X

D is 0 for what a rotation, a shift and a scale make alike, and 1 of zeros. It says how far a perturbation moves a
representation, not how well this keeps the shape of what it represents; and it falls with the rank, as few directions
that carry much hide those that moved. Of unrelated vectors it is below 1: see `chance_distance`.

Source: Raju 2026 (arXiv 2604.04155) for D and the ablation; the nulls, D_k and the unbiased CKA beside it are ours.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

# Fewer inputs than this for every channel: D of unrelated vectors is then well below 1, and a warning is due.
INPUTS_OF_A_CHANNEL = 20
# Directions of D_k, shuffles of a null, blocks of a jackknife, and deviations in a band.
DIRECTIONS, SHUFFLES, BLOCKS, BAND = 8, 8, 8, 2.0
# Below this part of the vectors' own size, what is left by taking off the mean is rounding.
ROUNDING = 1e-12


def procrustes_distance(x: Tensor, y: Tensor) -> float:
    """D of (N, d) and (N, e), in [0, 1]; 1 where one of them is constant."""
    a, b = _normalised(x), _normalised(y)
    if a is None or b is None:
        return 1.0
    return math.sqrt(max(0.0, 1 - float(torch.linalg.svdvals(a.mT @ b).sum())))


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Unbiased linear CKA of (N, d) and (N, e), N >= 4: around 0 for unrelated vectors; 0 where one is constant."""
    a, b = _normalised(x), _normalised(y)
    if a is None or b is None:
        return 0.0
    size = _hsic(a, a) * _hsic(b, b)
    return _hsic(a, b) / math.sqrt(size) if size > 0 else 0.0


def participation(x: Tensor) -> float:
    """How many directions carry the variance of (N, d): k of k equal ones; 0 of constant vectors."""
    a = _normalised(x)
    return 0.0 if a is None else 1 / float((a.mT @ a).square().sum())


def on_shared_directions(x: Tensor, y: Tensor, directions: int) -> tuple[Tensor, Tensor]:
    """Both (N, d) on the first principal directions of x, at most as many as it has, each over its deviation in x."""
    a, b = _centred(x), _centred(y)
    _, size, axes = torch.linalg.svd(a.mT @ a)
    kept = int((size[:directions] > ROUNDING * size[0]).sum()) if size[0] > 0 else 0
    scaled = axes[:kept].mT / (size[:kept] / len(a)).sqrt()
    return a @ scaled, b @ scaled


def chance_distance(inputs: int, width: int) -> float:
    """D of unrelated isotropic Gaussian vectors, for inputs >= 6 width: sqrt(1 - 8 / (3 pi) sqrt(width / inputs))."""
    return math.sqrt(max(0.0, 1 - 8 / (3 * math.pi) * math.sqrt(width / inputs)))


def measure_moves(
    clean: Tensor, perturbed: list[Tensor], *, directions: int = DIRECTIONS, seed: int = 0
) -> dict[str, Any]:
    """One encoder's clean representations (N, d) against those of perturbed inputs, and against the same shuffled.

    Returns:
        By perturbation, in lists: "distance" D, "shared" D_k, "cka"; "null" and "null_band", mean of D over shuffled
        pairs and two deviations, "shared_null" of D_k, "cka_band", two deviations of a CKA around 0. And "rank".
    """
    clean = clean.double()
    moves = [_move(clean, other.double(), directions, seed) for other in perturbed]
    return {"rank": participation(clean), **{name: [move[name] for move in moves] for name in moves[0]}}


def _move(clean: Tensor, other: Tensor, directions: int, seed: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(seed)
    own, moved = on_shared_directions(clean, other, directions)
    shuffles = [torch.randperm(len(clean), generator=generator) for _ in range(SHUFFLES)]
    null = torch.tensor([procrustes_distance(clean, other[order]) for order in shuffles])
    of_cka = torch.tensor([linear_cka(clean, other[order]) for order in shuffles])
    return {
        "distance": procrustes_distance(clean, other),
        "shared": procrustes_distance(own, moved),
        "cka": linear_cka(clean, other),
        "null": float(null.mean()),
        "null_band": BAND * float(null.std()),
        "shared_null": math.fsum(procrustes_distance(own, moved[order]) for order in shuffles) / SHUFFLES,
        "cka_band": BAND * float(of_cka.square().mean().sqrt()),
    }


def distance_error(clean: Tensor, perturbed: Tensor) -> float:
    """Standard error of D, by leaving out one of BLOCKS stretches of neighbouring inputs after the other."""
    clean, perturbed = clean.double(), perturbed.double()
    block = torch.arange(len(clean)) * BLOCKS // len(clean)
    left = torch.tensor([procrustes_distance(clean[block != i], perturbed[block != i]) for i in range(BLOCKS)])
    return math.sqrt((BLOCKS - 1) / BLOCKS * float((left - left.mean()).square().sum()))


def _centred(x: Tensor) -> Tensor:
    x = x.double()
    return x - x.mean(0)


def _normalised(x: Tensor) -> Tensor | None:
    """Centred, of Frobenius norm 1; None of constant vectors."""
    centred = _centred(x)
    norm = float(centred.norm())
    return centred / norm if norm > ROUNDING * float(x.double().norm()) else None


def _hsic(x: Tensor, y: Tensor) -> float:
    """The unbiased HSIC (Song et al. 2012) of K = X X^T and L = Y Y^T without their diagonals, times n (n - 3).

    tr K L + sum K sum L / ((n - 1) (n - 2)) - 2 / (n - 2) 1^T K L 1, from products of d by e.
    """
    n = len(x)
    x_own, y_own = x.square().sum(-1), y.square().sum(-1)
    x_rows, y_rows = x @ x.sum(0) - x_own, y @ y.sum(0) - y_own
    products = (x.mT @ y).square().sum() - x_own @ y_own
    return float(products + x_rows.sum() * y_rows.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (x_rows @ y_rows))
