"""How gradients grow on their way down a stack, measured: the averaged partial Jacobian norm.

With h^l (n, d) the stream after block l, h^0 what enters the first,

    J(L, l) = E || d h^L / d h^l ||_F^2 / (n d)

over initialisations: the mean of all squared singular values. It is estimated with random signs z on h^L: the gradients
g^l = (d h^L / d h^l)^T z of all layers come from one backward pass, and E |g^l|^2 is the squared norm (Hutchinson).

Source: Alekseev 2026 (arXiv 2604.11890), who draws Gaussian z and goes back once for every layer.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kmixer.errors import InputError
from kmixer.layers.measured import TwoBranches
from kmixer.measure.evaluating import eagerly, evaluating
from kmixer.models.causal_lm import CausalLM
from kmixer.models.k_stack import KStack
from kmixer.models.sequence_classifier import SequenceClassifier
from kmixer.models.vision import VisionTransformer

# Interval around a mean of log J, in standard errors.
INTERVAL = 2.0


class Stream(NamedTuple):
    """What one model does to b inputs, layer by layer; numbers in float64."""

    growth: Tensor  # (b, L + 1), J(L, l) for l = 0 to L
    size: Tensor  # (b, L + 1), q = mean(h^2)
    cosine: Tensor  # (b, L + 1), mean over pairs of tokens; of one token 1
    covariance: Tensor  # (b, n, n), h^0 h^0^T / d
    hidden: list[Tensor]  # h^0 to h^L, (b, n, d)


def blocks_of(model: nn.Module, *, read_out: bool = False) -> list[nn.Module]:
    """The blocks that a model's stream passes, in order; of a refined stack, those of one pass.

    Raises InputError for a model that is not the library's, and for a read-out where there is none.
    """
    if not isinstance(model, CausalLM | SequenceClassifier | VisionTransformer):
        raise InputError(f"model: got {type(model).__name__}; allowed: a language model or a classifier of kmixer")
    stack = model if isinstance(model, VisionTransformer) else model.stack
    if isinstance(stack, KStack):
        return [stack.first, *stack.blocks, stack.last, *([stack.read_out] if read_out else [])]
    if read_out:
        raise InputError("read-out: this model has none; only a K-Stack ends in one")
    return [*stack.blocks]


def measure_stream(
    model: nn.Module,
    inputs: Tensor,
    *,
    probes: int = 2,
    seed: int = 0,
    read_out: bool = False,
    enter: Callable[[Tensor], Tensor] | None = None,
) -> Stream:
    """The growth of gradients in one model, in evaluation mode; the model is afterwards as it was.

    Args:
        inputs: tokens (b, t) without padding, or images: what the model takes.
        probes: draws of signs, each one backward pass for all layers.
        seed: of the signs.
        read_out: count the read-out of a K-Stack as its last block.
        enter: what is put in the place of h^0 (b, n, d); None leaves it.

    Raises InputError for a model without blocks, and for rows that the model does not take together.
    """
    blocks = blocks_of(model, read_out=read_out)
    inputs = inputs.to(next(model.parameters()).device)
    with (
        evaluating(model),
        _without_gradients(model),
        eagerly(model),
        torch.autocast(inputs.device.type, enabled=False),
    ):
        stream = _pass(model, blocks, inputs, enter)
        top = stream[-1]
        if len(top) != len(inputs):
            raise InputError("inputs: rows with padding, which this model takes one by one; give rows of one length")
        generator = torch.Generator().manual_seed(seed)
        growth = torch.zeros(len(top), len(blocks), dtype=torch.float64)
        for probe in range(probes):
            signs = (2 * torch.randint(2, top.shape, generator=generator) - 1).to(top)
            gradients = torch.autograd.grad(top, stream[:-1], signs, retain_graph=probe + 1 < probes)
            growth += torch.stack([_mean_square(gradient) for gradient in gradients], dim=-1)
    hidden = [h.detach() for h in stream]
    covariances = [covariance_of(h) for h in hidden]
    return Stream(
        torch.cat([growth / probes, torch.ones(len(top), 1, dtype=torch.float64)], dim=-1),
        torch.stack([_mean_square(h) for h in hidden], dim=-1),
        torch.stack([mean_cosine(covariance) for covariance in covariances], dim=-1),
        covariances[0],
        hidden,
    )


@torch.no_grad()
def stream_of(model: nn.Module, inputs: Tensor) -> list[Tensor]:
    """h^0 to h^L, each (b, n, d), of a model in evaluation mode. Raises InputError as `measure_stream` does."""
    blocks = blocks_of(model)
    inputs = inputs.to(next(model.parameters()).device)
    with evaluating(model), eagerly(model), torch.autocast(inputs.device.type, enabled=False):
        return [h.detach() for h in _pass(model, blocks, inputs, None)]


def symmetric_inputs(q: float, p: float, seed: int) -> Callable[[Tensor], Tensor]:
    """For `measure_stream`: vectors with |h_a|^2 / d = q and h_a . h_b / d = p in random directions, for h^0 (b, n, d).

    Raises InputError, when it is called, where n vectors of width d cannot have these products.
    """

    def enter(h: Tensor) -> Tensor:
        b, n, d = h.shape
        if n > d:
            raise InputError(f"symmetric inputs: got {n} positions of width {d}; they need as many channels: lower n")
        if not -q < p * (n - 1) or not p < q:
            raise InputError(f"symmetric inputs: got p = {p} with q = {q}; allowed: from -q / (n - 1) to q")
        gram = torch.full((n, n), p, dtype=torch.float64) + (q - p) * torch.eye(n, dtype=torch.float64)
        generator = torch.Generator().manual_seed(seed)
        directions = torch.linalg.qr(torch.randn(b, d, n, generator=generator, dtype=torch.float64))[0]
        return (math.sqrt(d) * torch.linalg.cholesky(gram) @ directions.mT).to(h)

    return enter


def summarise(streams: list[Stream]) -> dict[str, Any]:
    """Several initialisations of one model, or one model, as plain numbers; l = 0 to L where nothing else is said.

    Returns:
        "log_growth", mean over the initialisations of log J(L, l), and "log_growth_error", its standard error; of one
        model, mean and error over its inputs. "log_by_block", log J(l, l - 1) for l = 1 to L, how much block l
        amplifies, and its error. "total", J(L, 0), "total_interval", two errors to either side, and
        "first_block", J(1, 0). "q" and "cosine", mean squares of the stream and cosines between its tokens; "q_0",
        "p_0", variance and covariance of what enters. "draws": how many the errors are over, which are
        "initialisations" or "inputs"; of one there is no error, and it is 0.
    """
    log = torch.stack([stream.growth.mean(0) for stream in streams]).log()
    if len(streams) == 1:
        log = streams[0].growth.log()
    mean, error = mean_and_error(log)
    by_block, block_error = mean_and_error(log[:, :-1] - log[:, 1:])
    covariance = torch.stack([stream.covariance for stream in streams]).mean((0, 1))
    n = len(covariance)
    variance = float(torch.diagonal(covariance).mean())
    others = (float(covariance.sum()) - n * variance) / (n * (n - 1)) if n > 1 else 0.0
    return {
        "log_growth": mean,
        "log_growth_error": error,
        "log_by_block": by_block,
        "log_by_block_error": block_error,
        "total": math.exp(mean[0]),
        "total_interval": [math.exp(mean[0] + side * INTERVAL * error[0]) for side in (-1, 1)],
        "first_block": math.exp(by_block[0]),
        "q": torch.stack([stream.size for stream in streams]).mean((0, 1)).tolist(),
        "cosine": torch.stack([stream.cosine for stream in streams]).mean((0, 1)).tolist(),
        "q_0": variance,
        "p_0": others,
        "draws": len(log),
        "drawn": "initialisations" if len(streams) > 1 else "inputs",
    }


def sums_over_positions(model: nn.Module) -> bool:
    """Whether a mixer adds up what it has read without dividing by how much that is: J then grows with the length."""
    return any(isinstance(part, TwoBranches) for part in model.modules())


def mean_and_error(draws: Tensor) -> tuple[list[float], list[float]]:
    """Over the rows; of one row the error is 0."""
    error = draws.std(0) / math.sqrt(len(draws)) if len(draws) > 1 else torch.zeros_like(draws[0])
    return draws.mean(0).tolist(), error.tolist()


@contextlib.contextmanager
def entering(block: nn.Module, enter: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """For the time of the block of code, a block of a model takes what `enter` makes of its input."""
    handle = block.register_forward_pre_hook(lambda _, arguments: (enter(arguments[0]), *arguments[1:]))
    try:
        yield
    finally:
        handle.remove()


class _TopReachedError(Exception):
    """The last block is done, and what comes after it is not needed."""


def _pass(
    model: nn.Module, blocks: list[nn.Module], inputs: Tensor, enter: Callable[[Tensor], Tensor] | None
) -> list[Tensor]:
    """h^0 to h^L, from h^0 on with a graph, of the first pass of a refined stack."""
    stream: list[Tensor] = []

    def begin(h: Tensor) -> Tensor:
        stream.append((h if enter is None else enter(h)).detach().requires_grad_())
        return stream[0]

    def note(block: nn.Module, _: tuple[Any, ...], output: Any) -> None:
        stream.append(output[0] if isinstance(output, tuple) else output)
        if block is blocks[-1]:
            raise _TopReachedError

    handles = [block.register_forward_hook(note) for block in blocks]
    try:
        with torch.enable_grad(), contextlib.suppress(_TopReachedError), entering(blocks[0], begin):
            model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return stream


@contextlib.contextmanager
def _without_gradients(model: nn.Module) -> Iterator[None]:
    """For the time of the block no parameter takes a gradient, which is not needed here and costs as much again."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_()


def _mean_square(h: Tensor) -> Tensor:
    """Of (b, n, d), over tokens and channels: (b,)."""
    return h.double().square().mean((1, 2)).cpu()


def covariance_of(h: Tensor) -> Tensor:
    """h h^T / d of (b, n, d), in float64: (b, n, n)."""
    h = h.double()
    return (h @ h.mT / h.shape[-1]).cpu()


def mean_cosine(covariance: Tensor) -> Tensor:
    """Over the pairs of different tokens, of covariances (..., n, n); of one token 1."""
    n = covariance.shape[-1]
    deviation = torch.diagonal(covariance, dim1=-2, dim2=-1).sqrt()
    cosine = covariance / (deviation.unsqueeze(-1) * deviation.unsqueeze(-2))
    return (cosine.sum((-2, -1)) - n) / (n * (n - 1)) if n > 1 else covariance.new_ones(covariance.shape[:-2])
