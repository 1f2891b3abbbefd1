"""What the levels of an attention at several resolutions have learned: their scores, and the shape of their features.

A score matrix splits uniquely into a symmetric part, two positions alike to each other, and an antisymmetric one,
which of two comes first; the two are orthogonal, so their energies add up (Cirrincione 2026, abstract).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from kmixer.layers.measured import Levels


@torch.no_grad()
def measure_levels(layer: Levels, x: Tensor) -> dict[str, list[list[float]]]:
    """Measures of each level of a layer on inputs (b, t, d), one list per level.

    Returns:
        "reciprocity", a number per head: the part of the energy (squared Frobenius norm) of the unmasked scores that is
        symmetric; the rest is directional. "smallest_eigenvalue", a number per head: of the symmetric part of
        W_Q W_K^T; where none is negative the scores are a positive semidefinite kernel. "kurtosis", one number:
        Mardia's of the level's rows over that of a normal distribution, 1; left out where there are too few rows.
        "fit_error" and "remainder", a number per head: see `approximation`, of the levels up to this one.
    """
    measures: dict[str, list[list[float]]] = {"reciprocity": [], "smallest_eigenvalue": [], "kurtosis": []}
    terms = []
    for level, (rows, scores, weight, forms) in enumerate(layer.score_levels(x)):
        measures["reciprocity"].append(symmetric_part(scores))
        cells = torch.arange(x.shape[1], device=x.device) >> level
        terms.append(weight[:, None, None] * scores[:, :, cells[:, None], cells])
        measures["smallest_eigenvalue"].append(torch.linalg.eigvalsh((forms + forms.mT) / 2)[:, 0].tolist())
        flat = rows.flatten(0, 1).double()
        measures["kurtosis"].append([mardia_kurtosis(flat)] if len(flat) > 2 * flat.shape[1] else [])
    return measures | approximation(terms, x.double())


def approximation(terms: list[Float[Tensor, "b h t t"]], x: Float[Tensor, "b t d"]) -> dict[str, list[list[float]]]:
    """How the unmasked scores S_L of the first L levels stand to full attention, and to the scores of all levels.

    Args:
        terms: what each level adds to the scores, its weight included.
        x: the features that the layer sees.

    Returns, for L = 1, 2, ... and every head:
        "fit_error": |S_L - X W X^T| / |S_L| in Frobenius norm, W the matrix that makes it least for each sequence:
        how far the scores are from those of any full attention on the same features. Without rotary positions it is
        zero for one level. Left out unless a sequence is longer than its features are wide, where every fit is exact.
        "remainder": |S - S_L| / |S|, S the scores of all levels: what the levels from L on add.

    Our reading of the approximation error of Cirrincione 2026, of which we know the abstract.
    """
    measures: dict[str, list[list[float]]] = {"fit_error": [], "remainder": []}
    whole = torch.stack(terms).sum(0)
    columns, lengths, _ = torch.linalg.svd(x, full_matrices=False)
    spans = lengths / lengths[:, :1] > 1e-9
    columns = (columns * spans.unsqueeze(1)).unsqueeze(1)  # (b, 1, t, d), orthonormal or zero
    partial = torch.zeros_like(whole)
    for term in terms:
        partial = partial + term
        energy = partial.square().sum((0, 2, 3))
        fitted = (columns.mT @ partial @ columns).square().sum((0, 2, 3))  # X W X^T is the projection of S_L
        error = (1 - fitted / energy).clamp(min=0).sqrt()
        measures["fit_error"].append(error.tolist() if x.shape[1] > x.shape[2] else [])
        measures["remainder"].append(
            ((whole - partial).square().sum((0, 2, 3)) / whole.square().sum((0, 2, 3))).sqrt().tolist()
        )
    return measures


def symmetric_part(scores: Tensor) -> list[float]:
    """|S_sym|^2 / |S|^2 of scores (b, h, n, n), for each head over the batch; 1 for scores that are all zero."""
    symmetric = ((scores + scores.mT) / 2).square().sum((0, 2, 3))
    whole = scores.square().sum((0, 2, 3))
    return torch.where(whole > 0, symmetric / whole, torch.ones_like(whole)).tolist()


def mardia_kurtosis(rows: Tensor) -> float:
    """Mean of ((x - m)^T C^-1 (x - m))^2 over rows (n, d), divided by d (d + 2): 1 for a normal distribution.

    Source: Mardia 1970. Directions in which the rows do not vary are left out.
    """
    centred = rows - rows.mean(0)
    values, vectors = torch.linalg.eigh(centred.mT @ centred / len(rows))
    varied = values > 1e-10 * values[-1]
    d = int(varied.sum())
    if d == 0:
        return 1.0
    whitened = centred @ vectors[:, varied] / values[varied].sqrt()
    return float(whitened.square().sum(1).square().mean() / (d * (d + 2)))
