"""What a model has learned, measured: the shares of its two ways of mixing, its decays, its step size.

Recorded at every evaluation of a training run, and measurable on any model afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kmixer.layers.measured import Columns, Learned, Levels, TwoBranches
from kmixer.measure.copies import measure_copies
from kmixer.measure.evaluating import eagerly, evaluating
from kmixer.measure.fast_weights import measure_fast_weights
from kmixer.measure.levels import measure_levels
from kmixer.measure.locality import attention_weights, inputs_of, measure_locality
from kmixer.measure.norms import PointwiseNorms
from kmixer.models.causal_lm import CausalLM
from kmixer.models.k_stack import KStack
from kmixer.models.vision import VisionTransformer

# Tokens the shares and residuals are measured on.
MEASURED_TOKENS = 16384
# Windows and positions on which all attention weights are looked at.
LOCALITY_WINDOWS, LOCALITY_POSITIONS = 4, 256


@torch.no_grad()
def measure_dynamics(model: CausalLM, tokens: Tensor) -> dict[str, Any]:
    """Learned values and measured shares of a model in evaluation mode, on windows of tokens (b, t).

    Returns:
        Of the K2 layers, one list or value each: "decay"; "alpha"; "gate", sigmoid of the base kernel's gate
        logit; "base_share", |base| / (|base| + |decay|), norms of the two branches over all tokens.
        "base_kernel", one list a kernel: mean weight by lag. Of a refined stack "eta" and "residuals", one
        a refinement step: |K(h) - h| / |h|. "sigma", bandwidths of the heads of each Gaussian layer;
        "level_weights", of the levels in every head of each hierarchical layer, and "levels", see `measure_levels`.
        "column_residual" and learned "temperature" of Sinkhorn layers, see `kmixer.layers.measured.Columns`. Of the
        attention layers "locality", see `measure_locality`. Of a copy memory "copy_gate", of every layer that takes
        copies, by length of the match where the gate knows it, and "copies", see `measure_copies`. Of fast weights
        "fast_tau" and "fast_taps", see `FastWeights.learned`, and "fast_weights", see `measure_fast_weights`.
        Of norms that are functions of every number alone "norms", see `PointwiseNorms`.
        What a model does not have is left out.
    """
    stack = model.stack
    recorder = None
    if isinstance(stack, KStack) and stack.refined:
        recorder = _Residuals(stack)
    measured = measure_mixers(model, tokens, locality=(LOCALITY_WINDOWS, LOCALITY_POSITIONS))
    if recorder is not None and isinstance(stack, KStack):
        recorder.remove()
        measured["eta"] = float(stack.eta())
        measured["residuals"] = recorder.residuals
    if model.copy_memory is not None:
        (measured["copy_gate"],) = measured["copy_gate"]  # one module has those of all layers
        measured["copies"] = measure_copies(model, tokens)
    if model.config.fast_weights is not None and tokens.shape[1] > 1:
        measured["fast_weights"] = measure_fast_weights(model, tokens)
    return measured


@torch.no_grad()
def measure_mixers(model: Any, inputs: Tensor, locality: tuple[int, int] | None = None) -> dict[str, Any]:
    """What `measure_dynamics` finds of the mixers of any model, on one batch of inputs.

    `locality` bounds the rows and positions on which all attention weights are looked at.
    """
    two_branches = [part for part in model.modules() if isinstance(part, TwoBranches)]
    with_levels = [part for part in model.modules() if isinstance(part, Levels)]
    with_columns = [part for part in model.modules() if isinstance(part, Columns)]
    recorder, norms = _Shares(two_branches), PointwiseNorms(model)
    inputs = inputs.to(next(model.parameters()).device)
    with evaluating(model), eagerly(model):
        try:
            model(inputs)
        finally:
            recorder.remove()
            norms.remove()
        looked_at = inputs if locality is None else inputs[: locality[0], : locality[1]]
        weights = attention_weights(model, looked_at)
        reached = inputs_of(model, with_levels, looked_at)
        before_columns = inputs_of(model, with_columns, looked_at)
        residuals = [layer.column_residual(x) for layer, x in zip(with_columns, before_columns, strict=True)]
    measured: dict[str, Any] = {}
    for part in model.modules():
        if isinstance(part, Learned):
            for key, values in part.learned().items():
                measured.setdefault(key, []).append(values)
    if shares := recorder.base_shares():
        measured["base_share"] = shares
    if (of_norms := norms.measured()) is not None:
        measured["norms"] = of_norms
    if with_levels:
        measured["levels"] = [measure_levels(layer, x) for layer, x in zip(with_levels, reached, strict=True)]
    if residuals:
        measured["column_residual"] = residuals
    if weights:
        patches = model.patch_places() if isinstance(model, VisionTransformer) else None
        measured["locality"] = measure_locality(weights, patches)
    return measured


def first_windows(tokens: Tensor, window: int) -> Tensor:
    """The first windows (b, window) of a text, MEASURED_TOKENS tokens or one window."""
    count = min(max(1, MEASURED_TOKENS // window), len(tokens) // window)
    return tokens[: count * window].view(count, window).long()


class _Shares:
    """Hooks that measure the two branches of layers in one forward pass, in which a layer may be called again."""

    def __init__(self, layers: list[Any]) -> None:
        self.energies: list[tuple[float, float] | None] = [None] * len(layers)
        self.handles = [layer.register_forward_pre_hook(self._note(i)) for i, layer in enumerate(layers)]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def base_shares(self) -> list[float]:
        """Of every layer that has a base kernel |base| / (|base| + |other|), 0 where both are."""
        roots = [tuple(map(math.sqrt, energies)) for energies in self.energies if energies is not None]
        return [base / (base + other) if base + other > 0 else 0.0 for base, other in roots]

    def _note(self, index: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def note(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
            assert isinstance(layer, TwoBranches)
            x, *rest = inputs
            energies = layer.branch_energies(x, *rest)
            if energies is not None:
                base, other = self.energies[index] or (0.0, 0.0)
                self.energies[index] = base + energies[0], other + energies[1]

        return note


class _Residuals:
    """Hooks that measure |K(h) - h| / |h| at every step of a refined stack."""

    def __init__(self, stack: KStack) -> None:
        self.residuals: list[float] = []
        self.handles = [
            stack.first.register_forward_pre_hook(self._note_start),
            stack.read_out.register_forward_hook(self._note_residual),
        ]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def _note_start(self, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.start = inputs[0]

    def _note_residual(self, layer: nn.Module, inputs: tuple[Any, ...], refined: Tensor) -> None:
        self.residuals.append(float((refined - self.start).norm() / (self.start.norm() + 1e-6)))
