"""Where attention looks: how many keys a head attends to, how far, and how far information travels through layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kmixer.layers.measured import Attention
from kmixer.measure.evaluating import evaluating


@torch.no_grad()
def inputs_of(model: nn.Module, layers: Sequence[Any], *inputs: Any) -> list[Tensor]:
    """What reaches these layers in one forward pass of a model in evaluation mode, in the order of the pass.

    The model must not be compiled while this runs: hooks would have its layers compiled again.
    """
    reached: list[Tensor] = []
    handles = [layer.register_forward_pre_hook(lambda _, arguments: reached.append(arguments[0])) for layer in layers]
    try:
        if layers:
            with evaluating(model):
                model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return reached


def attention_weights(model: nn.Module, *inputs: Any) -> list[Float[Tensor, "b h t t"]]:
    """The weights of every attention layer that has them in one forward pass of a model, in order; see `inputs_of`."""
    layers = [part for part in model.modules() if isinstance(part, Attention)]
    reached = inputs_of(model, layers, *inputs)
    weights = [layer.attention_weights(x) for layer, x in zip(layers, reached, strict=True)]
    return [layer_weights for layer_weights in weights if layer_weights is not None]


def measure_locality(
    weights: list[Float[Tensor, "b h t t"]], places: Float[Tensor, "n k"] | None = None
) -> dict[str, list[list[float]]]:
    """How local every head is: lists of layers of heads, means over all queries.

    Args:
        weights: of every layer.
        places: coordinates of the last n positions; those before them, a class token, have none. None is 0, 1, ...

    Returns:
        "effective_keys", the exponential of the entropy of a query's weights: 1 for one key, n for n alike;
        "distance", the mean distance of query and key under the weights, in the units of the places: among the
        positions that have one, the weights between them made to add to 1 again; "self_weight", what a position takes
        of itself.
    """
    measures: dict[str, list[list[float]]] = {"effective_keys": [], "distance": [], "self_weight": []}
    for layer in weights:
        w = layer.double()
        at = torch.arange(w.shape[-1], device=w.device)[:, None] if places is None else places.to(w.device)
        distance = torch.cdist(at.double(), at.double(), compute_mode="donot_use_mm_for_euclid_dist")
        placed = w[:, :, -len(at) :, -len(at) :]
        shares = placed / placed.sum(-1, keepdim=True).clamp(min=torch.finfo(w.dtype).tiny)
        entropy = -(w * w.clamp(min=torch.finfo(w.dtype).tiny).log()).sum(-1)
        measures["effective_keys"].append(entropy.exp().mean((0, 2)).tolist())
        measures["distance"].append((shares * distance).sum(-1).mean((0, 2)).tolist())
        measures["self_weight"].append(torch.diagonal(w, dim1=-2, dim2=-1).mean((0, 2)).tolist())
    return measures


def attention_rollout(weights: list[Float[Tensor, "b h t t"]]) -> Float[Tensor, "b t t"]:
    """How much of each input position every output position holds, by the weights alone.

    The product over layers of 0.5 (mean over heads) + 0.5 I, rows normalised (Abnar and Zuidema 2020):
    half of every block is its residual. What feed-forward layers and matrices do is left out.
    """
    rollout: Tensor | None = None
    for layer in weights:
        mixed = 0.5 * layer.mean(1) + 0.5 * torch.eye(layer.shape[-1], dtype=layer.dtype, device=layer.device)
        mixed = mixed / mixed.sum(-1, keepdim=True)
        rollout = mixed if rollout is None else mixed @ rollout
    assert rollout is not None
    return rollout
