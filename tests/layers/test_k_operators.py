"""K0, K1 and K2 against their formulas, and the laws every mixer keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kmixer.errors import InputError
from kmixer.layers import K0, K1, K2, BaseKernel
from tests.models.laws import assert_a_split_gives_the_whole, draw_cuts, of_layer

KERNELS = ["none", "dense", "low_rank", "toeplitz", "conv"]
SIZES = {"dense": 80, "low_rank": 80, "toeplitz": 50, "conv": 8}


def make_k2(kernel: Any, **options: Any) -> K2:
    torch.manual_seed(0)
    base = None if kernel == "none" else BaseKernel(kernel, SIZES[kernel])
    return K2(6, 3, base_kernel=base, **options).double()


def hidden(t: int, b: int = 2) -> Tensor:
    return torch.randn(b, t, 6, generator=torch.Generator().manual_seed(t), dtype=torch.float64)


def rms_norm(x: Tensor, scale: Tensor) -> Tensor:
    return scale * x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-8)


def mlp(x: Tensor, layer: Any) -> Tensor:
    up = x @ layer.up.weight.T + layer.up.bias
    return (up * 0.5 * (1 + torch.erf(up / 2**0.5))) @ layer.down.weight.T + layer.down.bias


def randomise(layer: torch.nn.Module) -> None:
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)


def test_k1_is_its_formula() -> None:
    layer = K1(6).double()
    randomise(layer)
    h = hidden(5)
    expected = h + rms_norm(h, layer.mixing_norm.weight) @ layer.mixer.projection.weight.T + layer.mixer.projection.bias
    expected = expected + mlp(rms_norm(expected, layer.feed_forward_norm.weight), layer.feed_forward)
    torch.testing.assert_close(layer(h)[0], expected)


def test_k0_is_its_formula() -> None:
    layer = K0(6).double()
    randomise(layer)
    h = hidden(5)
    torch.testing.assert_close(layer(h), h + layer.gain * rms_norm(h, layer.norm.weight) + layer.bias)


@pytest.mark.parametrize("per_channel", [True, False])
def test_k2_is_its_formula(per_channel: bool) -> None:
    layer = make_k2("conv", decay_range=(0.15, 0.99), alpha_cap=0.8, alpha_per_channel=per_channel)
    randomise(layer)
    mixer = layer.mixer
    h = hidden(20, b=1)
    x = rms_norm(h, layer.mixing_norm.weight)[0]
    q, k = x @ mixer.query, x @ mixer.key
    q, k = q / q.norm(dim=1, keepdim=True), k / k.norm(dim=1, keepdim=True)
    decay = 0.15 + 0.84 / (1 + torch.exp(-mixer.decay_logit))
    alpha = (0.8 / (1 + torch.exp(-mixer.alpha_logit))).expand(3)
    taps = mixer.base_kernel.weights[0]
    gate = 1 / (1 + torch.exp(-mixer.gate_logit))
    mixed = []
    for t in range(20):
        y = sum((alpha * q[t] * k[j] * decay ** (t - j)).sum() * x[j] for j in range(t + 1))
        mixed.append(y + gate * sum(taps[lag] * x[t - lag] for lag in range(min(8, t + 1))))
    expected = h + torch.stack(mixed)[None] @ mixer.projection.weight.T + mixer.projection.bias
    expected = expected + mlp(rms_norm(expected, layer.feed_forward_norm.weight), layer.feed_forward)
    torch.testing.assert_close(layer(h)[0], expected)


@pytest.mark.parametrize("kernel", KERNELS)
@given(st.integers(1, 80), st.data())
def test_any_split_gives_the_whole(kernel: str, t: int, data: st.DataObject) -> None:
    layer, h = make_k2(kernel), hidden(t)
    start = layer.initial_state(2)
    assert_a_split_gives_the_whole(of_layer(layer, h), t, draw_cuts(data, t), start=start, tolerance=1e-10)


@pytest.mark.parametrize("kernel", KERNELS)
def test_it_is_causal_and_rows_are_independent(kernel: str) -> None:
    layer, h = make_k2(kernel), hidden(70, b=3)
    before, _ = layer(h)
    changed = h.clone()
    changed[1, 40] += 1.0
    after, _ = layer(changed)
    assert torch.equal(before[:, :40], after[:, :40])
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert not torch.equal(before[1, 40:], after[1, 40:])
    for row in range(3):
        torch.testing.assert_close(layer(h[row : row + 1])[0], before[row : row + 1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_parameter_gets_a_gradient(kernel: str) -> None:
    layer = make_k2(kernel)
    layer(hidden(40))[0].square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    ("rank", "bounds", "init", "expected"),
    [
        # Measured on Koneko's code, families (a), (b) and (c).
        (32, (0.85, 1.0), "fraction", [0.9925, 0.99925]),
        (32, (0.15, 1.0), "linear", [0.95, 0.995]),
        (32, (0.15, 0.995), "linear", [0.95, 0.9949]),
        (4, (0.05, 1.0), "time_constant", [0.05, 0.99034, 0.99990, 0.999999]),
    ],
)
def test_decays_start_where_koneko_starts_them(
    rank: int, bounds: tuple[float, float], init: Any, expected: list[float]
) -> None:
    decay = K2(4, rank, decay_range=bounds, decay_init=init).double().mixer.decay().detach()
    chosen = decay if len(expected) == rank else decay[[0, -1]]
    torch.testing.assert_close(chosen, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=6e-6)


def test_a_linear_start_outside_its_range_falls_back_to_the_middle() -> None:
    decay = K2(4, 3, decay_range=(0.1, 0.5), decay_init="linear").mixer.decay()
    torch.testing.assert_close(decay, torch.full((3,), 0.3))


@given(st.floats(0.01, 0.9), st.floats(0.01, 0.99), st.integers(1, 8), st.sampled_from(["linear", "time_constant"]))
def test_decays_start_inside_any_range(low: float, width: float, rank: int, init: Any) -> None:
    high = low + (1 - low) * width
    decay = K2(4, rank, decay_range=(low, high), decay_init=init).double().mixer.decay()
    assert bool((decay >= low).all())
    assert bool((decay <= high).all())


@pytest.mark.parametrize("kind", ["dense", "toeplitz", "conv"])
@pytest.mark.parametrize("init", ["exponential", "uniform"])
def test_base_kernels_start_as_normalised_weights(kind: Any, init: Any) -> None:
    weight = BaseKernel(kind, 12, init=init).weights[0].double()
    if kind != "dense":
        expected = torch.exp(-0.15 * torch.arange(12.0)) if init == "exponential" else torch.ones(12)
        torch.testing.assert_close(weight, (expected / expected.sum()).double(), rtol=1e-5, atol=1e-7)
        return
    for row in range(12):
        lag = torch.arange(row, -1, -1.0)
        expected = torch.exp(-0.15 * lag) if init == "exponential" else torch.ones(row + 1)
        torch.testing.assert_close(weight[row, : row + 1], (expected / expected.sum()).double(), rtol=1e-5, atol=1e-7)
    assert bool((weight.triu(1) == 0).all())


def test_a_low_rank_kernel_starts_as_the_best_fit_to_the_dense_one() -> None:
    dense = BaseKernel("dense", 20).weights[0]
    left, right = BaseKernel("low_rank", 20, rank=2).weights
    u, s, vh = torch.linalg.svd(dense)
    torch.testing.assert_close(left @ right.T, u[:, :2] @ torch.diag(s[:2]) @ vh[:2], rtol=1e-4, atol=1e-5)


def test_a_shared_kernel_is_passed_in_and_only_where_it_was_announced() -> None:
    kernel = BaseKernel("conv", 4)
    announced, own = K2(6, 2, base_kernel="shared"), K2(6, 2, base_kernel=BaseKernel("conv", 4))
    h = hidden(5).float()
    own.load_state_dict({**announced.state_dict(), "mixer.base_kernel.weights.0": kernel.weights[0]})
    torch.testing.assert_close(announced(h, None, kernel), own(h))
    with pytest.raises(InputError, match="pass the kernel to every call"):
        announced(h)
    with pytest.raises(InputError, match="takes no kernel from outside"):
        own(h, None, kernel)


def test_a_decay_range_outside_its_bounds_is_named() -> None:
    with pytest.raises(InputError, match=r"decay_range: got \(0.5, 1.5\); allowed: 0 < low < high <= 1"):
        K2(4, 2, decay_range=(0.5, 1.5))
