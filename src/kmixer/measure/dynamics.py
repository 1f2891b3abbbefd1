"""What a model has learned, measured: the shares of its two ways of mixing, its decays, its step size.

Recorded at every evaluation of a training run, and measurable on any model afterwards.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kmixer.layers import BaseKernel, GaussianAttention, HierarchicalAttention, K2Mixer
from kmixer.measure.levels import measure_levels
from kmixer.measure.locality import attention_weights, inputs_of, measure_locality
from kmixer.models.causal_lm import CausalLM
from kmixer.models.k_stack import KStack
from kmixer.models.vision import VisionTransformer
from kmixer.training.optimizers import author_group

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
        Of the attention layers "locality", see `measure_locality`. What a model does not have is left out.
    """
    stack = model.stack
    recorder = None
    if isinstance(stack, KStack) and stack.refined:
        recorder = _Residuals(stack)
    found = measure_mixers(model, tokens, locality=(LOCALITY_WINDOWS, LOCALITY_POSITIONS))
    if recorder is not None and isinstance(stack, KStack):
        recorder.remove()
        found["eta"] = float(stack.eta())
        found["residuals"] = recorder.residuals
    return found


@torch.no_grad()
def measure_mixers(model: Any, inputs: Tensor, locality: tuple[int, int] | None = None) -> dict[str, Any]:
    """What `measure_dynamics` finds of the mixers of any model, on one batch of inputs.

    `locality` bounds the rows and positions on which all attention weights are looked at.
    """
    k2_layers = [part for part in model.modules() if isinstance(part, K2Mixer)]
    hierarchical_layers = [part for part in model.modules() if isinstance(part, HierarchicalAttention)]
    recorder = _Shares(k2_layers)
    was_training = model.training
    model.eval()
    # Hooks would make torch.compile translate the layers once more.
    compiled = any(part._compiled_call_impl is not None for part in model.modules())
    inputs = inputs.to(next(model.parameters()).device)
    with torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext():
        try:
            model(inputs)
        finally:
            recorder.remove()
        looked_at = inputs if locality is None else inputs[: locality[0], : locality[1]]
        weights = attention_weights(model, looked_at)
        reached = inputs_of(model, hierarchical_layers, looked_at)
        model.train(was_training)
    found: dict[str, Any] = {}
    if k2_layers:
        found["decay"] = [layer.decay().tolist() for layer in k2_layers]
        found["alpha"] = [layer.alpha().reshape(-1).tolist() for layer in k2_layers]
    kernels = [part for part in model.modules() if isinstance(part, BaseKernel)]
    if kernels:
        found["gate"] = [float(torch.sigmoid(layer.gate_logit)) for layer in k2_layers if layer.gate_logit is not None]
        found["base_share"] = recorder.base_shares()
        found["base_kernel"] = [weights_by_lag(kernel) for kernel in kernels]
    gaussian_layers = [part for part in model.modules() if isinstance(part, GaussianAttention)]
    if gaussian_layers:
        found["sigma"] = [layer.sigma().tolist() for layer in gaussian_layers]
    if hierarchical_layers:
        found["level_weights"] = [layer.level_weights().tolist() for layer in hierarchical_layers]
        found["levels"] = [measure_levels(layer, x) for layer, x in zip(hierarchical_layers, reached, strict=True)]
    if weights:
        places = model.patch_places() if isinstance(model, VisionTransformer) else None
        found["locality"] = measure_locality(weights, places)
    return found


def first_windows(tokens: Tensor, window: int) -> Tensor:
    """The first windows (b, window) of a text, MEASURED_TOKENS tokens or one window."""
    count = min(max(1, MEASURED_TOKENS // window), len(tokens) // window)
    return tokens[: count * window].view(count, window).long()


class _Shares:
    """Hooks that measure the two branches of K2 layers in one forward pass."""

    def __init__(self, layers: list[K2Mixer]) -> None:
        self.squares = [[0.0, 0.0] for _ in layers]  # of the base branch and of the decay branch
        self.handles = [layer.register_forward_pre_hook(self._note(i)) for i, layer in enumerate(layers)]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def base_shares(self) -> list[float]:
        roots = [(math.sqrt(base), math.sqrt(decay)) for base, decay in self.squares]
        return [base / (base + decay) if base + decay > 0 else 0.0 for base, decay in roots]

    def _note(self, index: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def note(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
            assert isinstance(layer, K2Mixer)
            x, *rest = inputs
            decay, base, _ = layer.branches(x, *rest)
            self.squares[index][1] += float(decay.double().square().sum())
            if base is not None:
                self.squares[index][0] += float(base.double().square().sum())

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


def weights_by_lag(kernel: BaseKernel) -> list[float]:
    """The weight of each lag: the filter itself, or the mean along each diagonal of a dense or low-rank kernel."""
    weights = [weight.detach() for weight in kernel.weights]
    if kernel.kind in ("toeplitz", "conv"):
        return [float(weight) for weight in weights[0]]
    matrix = weights[0] if kernel.kind == "dense" else weights[0] @ weights[1].T
    return [float(torch.diagonal(matrix, -lag).mean()) for lag in range(len(matrix))]


def norms_by_group(model: nn.Module, tensor_of: Callable[[str, nn.Parameter], Tensor | None]) -> dict[str, float]:
    """Norm of a tensor of every trained parameter, over each group of the author's `grouped` optimiser."""
    squares: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        tensor = tensor_of(name, parameter) if parameter.requires_grad else None
        if tensor is not None:
            group = author_group(name)
            squares[group] = squares.get(group, 0.0) + float(tensor.detach().double().square().sum())
    return {group: math.sqrt(square) for group, square in squares.items()}
