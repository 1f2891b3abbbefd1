"""Tensors on two devices and dtypes that are no real floats are named by every public operator."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kmixer.errors import InputError
from kmixer.ops import base_kernel, gaussian_attention, hierarchical_attention, sinkhorn, sinkhorn_attention
from kmixer.ops.attention.softmax import softmax_attention
from kmixer.ops.cross_entropy import cross_entropies

pytestmark = pytest.mark.usefixtures("unchecked")


def targets(like: Tensor) -> Tensor:
    return torch.zeros(2, dtype=torch.int64, device=like.device)


# Each operator of two tensors, with what it calls the second.
OPERATORS: dict[str, tuple[Callable[[Tensor, Tensor], object], tuple[int, ...], tuple[int, ...], str]] = {
    "base_kernel": (lambda x, w: base_kernel(x, (w,), kind="conv"), (2, 5, 16), (4,), "weight 0"),
    "base_kernel, state": (
        lambda x, s: base_kernel(x, (x.new_ones(4),), kind="conv", state=s),
        (2, 5, 16),
        (2, 3, 16),
        "state",
    ),
    "gaussian_attention": (gaussian_attention, (2, 2, 6, 4), (2,), "log_sigma"),
    "gaussian_attention, values": (
        lambda x, v: gaussian_attention(x, x.new_zeros(2), values=v),
        (2, 2, 6, 4),
        (2, 2, 6, 4),
        "values",
    ),
    "hierarchical_attention": (
        lambda x, w: hierarchical_attention([x], [x], x, w, t=6),
        (2, 2, 6, 4),
        (2, 1),
        "weights",
    ),
    "hierarchical_attention, keys": (
        lambda x, k: hierarchical_attention([x], [k], x, x.new_ones(2, 1), t=6),
        (2, 2, 6, 4),
        (2, 2, 6, 4),
        "keys of level 0",
    ),
    "sinkhorn": (lambda s, columns: sinkhorn(s, 3, columns=columns), (6, 4), (4,), "columns"),
    "sinkhorn_attention": (lambda x, v: sinkhorn_attention(x, x, v), (2, 2, 6, 4), (2, 2, 6, 4), "values"),
    "softmax attention": (lambda x, v: softmax_attention(x, x, v), (2, 2, 6, 4), (2, 2, 6, 4), "values"),
}


@pytest.mark.parametrize(("function", "first", "second", "name"), OPERATORS.values(), ids=OPERATORS)
def test_one_device(
    function: Callable[..., object], first: tuple[int, ...], second: tuple[int, ...], name: str
) -> None:
    function(torch.ones(first), torch.ones(second))
    with pytest.raises(InputError, match=rf"{name} on meta.*; all tensors are on one device"):
        function(torch.ones(first), torch.ones(second, device="meta"))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
@pytest.mark.parametrize(("function", "first", "second", "name"), OPERATORS.values(), ids=OPERATORS)
def test_real_floats(
    function: Callable[..., object], first: tuple[int, ...], second: tuple[int, ...], name: str, dtype: torch.dtype
) -> None:
    what = str(dtype).removeprefix("torch.")
    with pytest.raises(InputError, match=rf"got {name} in {what}; allowed: float64, float32, bfloat16, float16$"):
        function(torch.ones(first), torch.ones(second, dtype=dtype))


def test_logits_are_floats_where_their_targets_are() -> None:
    logits = torch.zeros(2, 5)
    with pytest.raises(InputError, match="got logits in int64; allowed: float64"):
        cross_entropies(logits.long(), targets(logits))
    with pytest.raises(InputError, match="got logits on cpu, targets on meta; both are on one device"):
        cross_entropies(logits, targets(logits).to("meta"))
