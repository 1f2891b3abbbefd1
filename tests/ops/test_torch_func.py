"""torch.func over the operators: grad, vmap and jvp are right, or refused in one line where a backend was named."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from jaxtyping import config
from torch import Tensor

from kmixer.errors import InputError
from kmixer.ops import (
    base_kernel,
    decayed_linear_attention,
    gaussian_attention,
    hierarchical_attention,
    sinkhorn_attention,
)
from kmixer.ops.attention.softmax import softmax_attention
from kmixer.ops.cross_entropy import cross_entropies
from kmixer.ops.downsampling import filter_and_halve
from kmixer.ops.feed_forward import feed_forward, hidden_units
from kmixer.ops.fused import (
    dropout,
    linear_dropout_add,
    linear_gelu_dropout,
    normalize,
    rms_norm,
    scaled_norm_add,
    silu_gate,
)
from kmixer.ops.linear import linear_map

EPS = 1e-6


class Case(NamedTuple):
    function: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]


def decay(backend: Any) -> Case:
    def run(q: Tensor, k: Tensor, v: Tensor, rate: Tensor) -> Tensor:
        return decayed_linear_attention(q, k, v, -rate.square(), backend=backend)[0]

    return Case(run, ((2, 5, 3), (2, 5, 3), (2, 5, 4), (3,)))


def kernel(kind: Any, *shapes: tuple[int, ...]) -> Case:
    return Case(lambda x, *weights: base_kernel(x, weights, kind=kind)[0], ((2, 5, 16), *shapes))


def gaussian(backend: Any, **settings: Any) -> Case:
    return Case(lambda x, s: gaussian_attention(x, s, backend=backend, **settings), ((2, 2, 6, 4), (2,)))


def hierarchical(backend: Any) -> Case:
    def run(q: Tensor, k: Tensor, v: Tensor, weights: Tensor) -> Tensor:
        queries, keys = ([z, z[:, :, ::2]] for z in (q, k))
        return hierarchical_attention(queries, keys, v, weights.softmax(-1), t=6, backend=backend)

    return Case(run, (*((2, 2, 6, 4),) * 3, (2, 2)))


def sinkhorn(backend: Any, iterations: int = 5) -> Case:
    run = functools.partial(sinkhorn_attention, iterations=iterations, backend=backend)
    return Case(run, ((2, 2, 6, 4),) * 3)


def block(activation: Any) -> Case:
    return Case(
        lambda *tensors: feed_forward(*tensors, eps=EPS, dropout=0.0, activation=activation),
        ((2, 4), (4,), (8, 4), (8,), (4, 8), (4,)),
    )


CASES = {
    "decay": decay("auto"),
    "decay, recurrent": decay("recurrent"),
    "decay, mask": decay("mask"),
    "dense": kernel("dense", (8, 8)),
    "low rank": kernel("low_rank", (8, 3), (8, 3)),
    "toeplitz": kernel("toeplitz", (8,)),
    "conv": kernel("conv", (4,)),
    "gaussian": gaussian("auto"),
    "gaussian, naive": gaussian("naive"),
    "gaussian, window": gaussian("auto", window=2, exclude_self=True),
    "hierarchical": hierarchical("auto"),
    "hierarchical, naive": hierarchical("naive"),
    "sinkhorn": sinkhorn("auto"),
    "sinkhorn, one half-step": sinkhorn("auto", 1),
    "sinkhorn, naive": sinkhorn("naive"),
    "softmax": Case(softmax_attention, ((2, 2, 6, 4),) * 3),
    "softmax, window": Case(lambda q, k, v: softmax_attention(q, k, v, reach=2), ((2, 2, 6, 4),) * 3),
    "rms norm": Case(lambda x, w: rms_norm(x, w, EPS), ((2, 4), (4,))),
    "normalize": Case(lambda x: normalize(x, EPS), ((2, 4),)),
    "gate": Case(silu_gate, ((2, 4), (2, 4))),
    "gelu": Case(lambda *z: linear_gelu_dropout(*z, 0.0), ((2, 4), (5, 4), (5,))),
    "add": Case(lambda *z: linear_dropout_add(*z, 0.0), ((2, 5), (2, 4), (5, 4), (5,))),
    "norm and add": Case(lambda *z: scaled_norm_add(*z, EPS), ((2, 4), (4,), (4,))),
    "dropout": Case(lambda x: dropout(x, 0.0), ((2, 4),)),
    "linear": Case(linear_map, ((2, 4), (5, 4), (5,))),
    "hidden units": Case(lambda *z: hidden_units(*z, dropout=0.0), ((2, 4), (5, 4), (5,))),
    "feed-forward": block("gelu"),
    "feed-forward, squares": block("squared_relu"),
    "cross-entropy": Case(lambda x: cross_entropies(x, torch.tensor([0, 1]), 5.0), ((2, 4),)),
    "downsampling": Case(filter_and_halve, ((2, 3, 4), (2, 8, 4), (4, 4), (4, 4))),
}
REFUSED = {
    **{f"decay, {backend}": decay(backend) for backend in ("block", "native", "triton")},
    **{f"gaussian, {backend}": gaussian(backend) for backend in ("sdpa", "flex")},
    **{f"hierarchical, {backend}": hierarchical(backend) for backend in ("blocked", "native", "sdpa")},
    **{f"sinkhorn, {backend}": sinkhorn(backend) for backend in ("blocked", "native")},
}


@pytest.fixture(autouse=True)
def unchecked() -> Iterator[None]:
    """Wrapped tensors are no Tensor to the checks of shapes."""
    config.update("jaxtyping_disable", True)  # type: ignore[no-untyped-call]
    with warnings.catch_warnings():
        yield
    config.update("jaxtyping_disable", False)  # type: ignore[no-untyped-call]


def inputs(case: Case) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator) for shape in case.shapes]


def gradients(case: Case, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    leaves = [x.clone().requires_grad_() for x in tensors]
    return torch.autograd.grad(case.function(*leaves).sin().sum(), leaves)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_grad_is_that_of_autograd(case: Case) -> None:
    tensors = inputs(case)
    found = torch.func.grad(lambda *z: case.function(*z).sin().sum(), tuple(range(len(tensors))))(*tensors)
    torch.testing.assert_close(found, gradients(case, tensors), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_vmap_is_a_loop(case: Case) -> None:
    batches = [torch.stack([x, 0.9 * x]) for x in inputs(case)]
    expected = torch.stack([case.function(*(batch[i] for batch in batches)) for i in range(2)])
    torch.testing.assert_close(torch.func.vmap(case.function)(*batches), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_jvp_is_the_gradient_along_the_tangent(case: Case) -> None:
    tensors = inputs(case)
    tangents = [torch.cos(torch.arange(x.numel(), dtype=x.dtype)).view_as(x) for x in tensors]
    _, found = torch.func.jvp(lambda *z: case.function(*z).sin().sum(), tuple(tensors), tuple(tangents))
    expected = sum((g * t).sum() for g, t in zip(gradients(case, tensors), tangents, strict=True))
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_a_backend_that_was_named_and_has_no_part_in_them_is_refused(case: Case) -> None:
    tensors = inputs(case)
    calls = {
        "grad": lambda: torch.func.grad(lambda *z: case.function(*z).sum())(*tensors),
        "vmap": lambda: torch.func.vmap(case.function)(*(x[None] for x in tensors)),
        "jvp": lambda: torch.func.jvp(case.function, tuple(tensors), tuple(tensors)),
    }
    for call in calls.values():
        with pytest.raises(InputError, match=r"has no part in torch\.func .* or leave the choice to backend 'auto'$"):
            call()


def test_batches_of_gradients_of_an_earlier_graph_are_refused() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    y = linear_map(x, torch.randn(5, 4))
    if type(y.grad_fn).__name__ != "_LinearMapBackward":
        pytest.skip("the compiled kernels were not built")
    with pytest.raises(InputError, match="is_grads_batched=True"):
        torch.autograd.grad(y, x, torch.ones(2, 3, 5), is_grads_batched=True)
