"""The block is its formula, whatever its parts are: kernels take the place of the parts that they implement only."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize

from kmixer import native
from kmixer.layers import (
    K0,
    K1,
    K2,
    BaseKernel,
    FastWeights,
    FeedForward,
    K2Mixer,
    SoftmaxAttention,
    SquaredReluFeedForward,
)
from kmixer.layers import block as block_file
from kmixer.layers.block import Block, BlockState
from kmixer.layers.exactly import exactly
from kmixer.layers.linear import Linear, linear
from kmixer.layers.norms import RMSNorm, UnweightedRMSNorm
from tests.models.laws import assert_a_split_gives_the_whole, of_layer, one_at_a_time
from tests.models.unknown_parts import WAYS, Way, Wrapper, by_a_wrapper

WIDTH = 12


def block_of(mixer: nn.Module, norm: Callable[[], nn.Module], feed_forward: nn.Module, **options: Any) -> Block:
    return Block(norm(), mixer, norm(), feed_forward, **options)


# All kinds of blocks that models are made of.
BLOCKS: dict[str, Callable[[], Block]] = {
    "K1": lambda: K1(WIDTH),
    "K2": lambda: K2(WIDTH, 3, base_kernel=BaseKernel("conv", 4), output_gate=True),
    "transformer": lambda: block_of(SoftmaxAttention(WIDTH, 3), lambda: RMSNorm(WIDTH), FeedForward(WIDTH)),
    "transformer of K2": lambda: block_of(K2Mixer(WIDTH, 3), lambda: RMSNorm(WIDTH), FeedForward(WIDTH)),
    "nanochat": lambda: block_of(
        SoftmaxAttention(WIDTH, 3), UnweightedRMSNorm, SquaredReluFeedForward(WIDTH, hidden_width=20)
    ),
    "vision": lambda: block_of(
        SoftmaxAttention(WIDTH, 3, causal=False, rotary=False), lambda: nn.LayerNorm(WIDTH), FeedForward(WIDTH)
    ),
}
blocks = pytest.mark.parametrize("kind", BLOCKS)
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


def make(kind: str, dtype: torch.dtype = torch.float64) -> Block:
    torch.manual_seed(0)
    block = BLOCKS[kind]()
    for parameter in block.parameters():  # away from the start, so that every part matters
        nn.init.normal_(parameter, std=0.5)
    return block.to(dtype)


def hidden(t: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, t, WIDTH, generator=torch.Generator().manual_seed(t), dtype=torch.float64).to(dtype)


def by_modules(block: Block, x: Tensor) -> Tensor:
    """The definition: every part is called."""
    x = x + block.mixer(block.mixing_norm(x), None)[0]
    return x + block.feed_forward(block.feed_forward_norm(x))


def gradients(y: Tensor, block: Block, x: Tensor) -> list[Tensor]:
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return list(torch.autograd.grad((y * weights).sum(), [x, *block.parameters()], allow_unused=True))


@blocks
@dtypes
@pytest.mark.parametrize("t", [1, 7, 33, 130])
def test_it_is_its_modules_in_outputs_and_all_gradients(kind: str, dtype: torch.dtype, t: int) -> None:
    block, x = make(kind, dtype), hidden(t, dtype).requires_grad_()
    tolerance = 1e-10 if dtype == torch.float64 else 2e-4
    y, expected = block(x)[0], by_modules(block, x)
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    for ours, theirs in zip(gradients(y, block, x), gradients(expected, block, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * t**0.5)


@pytest.mark.parametrize("kind", ["K1", "K2", "transformer", "nanochat"])
def test_known_parts_are_one_kernel(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    block, calls = make(kind), []
    for name in ("feed_forward", "linear_dropout_add"):
        fused = getattr(block_file, name)
        monkeypatch.setattr(
            block_file, name, lambda *a, fused=fused, name=name, **k: (calls.append(name), fused(*a, **k))[1]
        )
    block(hidden(5))
    assert calls == (["linear_dropout_add"] if kind in ("K1", "K2") else []) + ["feed_forward"]


class TanhUnits(FeedForward):
    def hidden(self, x: Tensor) -> Tensor:
        return torch.tanh(self.up(x))


# What of a layer with fast weights is another than its type says.
UNITS: dict[str, Callable[[Block], object]] = {
    "nothing": lambda block: None,
    "other units": lambda block: setattr(block.feed_forward, "__class__", TanhUnits),
    "a hook": lambda block: block.feed_forward.up.register_forward_hook(lambda module, given, y: 2 * y),
    "an adapter": lambda block: setattr(block.feed_forward, "up", LowRankUpdate(block.feed_forward.up)),
    "no bias": lambda block: setattr(block.feed_forward, "up", linear(WIDTH, 2 * WIDTH, bias=False)),
}


@pytest.mark.parametrize("change", UNITS)
@dtypes
def test_hidden_units_that_fast_weights_read_are_one_kernel_where_they_are_known(
    change: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = make("transformer")
    block.feed_forward.fast = FastWeights(WIDTH, 2 * WIDTH, chunk=4, target="hidden", init="next", rate=0.3)
    UNITS[change](block)
    block.to(dtype)
    calls = []
    fused = block_file.hidden_units
    monkeypatch.setattr(block_file, "hidden_units", lambda *a, **k: (calls.append(a), fused(*a, **k))[1])
    x = hidden(19, dtype).requires_grad_()
    y, state = block(x)
    assert len(calls) == (change == "nothing")
    mixed = x + block.mixer(block.mixing_norm(x), None)[0]
    added, expected = block.feed_forward(block.feed_forward_norm(mixed))
    tolerance = 1e-10 if dtype == torch.float64 else 2e-4
    torch.testing.assert_close(y, mixed + added, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(state.feed_forward.weights, expected.weights, rtol=tolerance, atol=tolerance)
    for ours, theirs in zip(gradients(y, block, x), gradients(mixed + added, block, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=5 * tolerance)


def test_dropped_hidden_units_are_those_that_are_written() -> None:
    """Fast weights that read nothing yet leave what the fused kernel of the same seed computes."""
    block, x = make("K1", torch.float32), hidden(19, torch.float32)
    block.feed_forward.dropout = 0.4
    torch.manual_seed(3)
    expected = block.train()(x)[0]
    block.feed_forward.fast = FastWeights(WIDTH, 2 * WIDTH, chunk=4)
    torch.manual_seed(3)
    y, state = block(x, source=x)
    if native.kernels() is not None:
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert not state.feed_forward.weights.any()


def parts_of(kind: str) -> list[str]:
    """The parts of a block that are called."""
    return [name for name, _ in make(kind).named_modules() if name and not name.endswith("weights")]


# Of these their layer asks more than calls: its state's shape, which a wrapper without it cannot say.
ASKED = ("mixer.out", "mixer.base_kernel")
ALL_CHANGES = [
    pytest.param(way, kind, name, id=f"{kind}, {name}, {way.__name__}")
    for kind in BLOCKS
    for name in parts_of(kind)
    for way in WAYS
    if not (way is by_a_wrapper and name in ASKED)
]


@pytest.mark.parametrize(("way", "kind", "name"), ALL_CHANGES)
@dtypes
def test_a_part_of_another_kind_is_called(way: Way, kind: str, name: str, dtype: torch.dtype) -> None:
    block, x = make(kind, dtype), hidden(9, dtype)
    before, changed = block(x)[0], copy.deepcopy(block)
    way(changed, name)
    tolerance = 1e-10 if dtype == torch.float64 else 2e-4
    expected = by_modules(changed, x)
    torch.testing.assert_close(changed(x)[0], expected, rtol=tolerance, atol=tolerance)
    assert not torch.allclose(expected, before, rtol=1e-3, atol=1e-3)


class TanhNorm(RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(super().forward(x))


class TanhFeedForward(FeedForward):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


class LowRankUpdate(nn.Module):
    """A linear map and a low-rank one beside it, as adapters have it."""

    def __init__(self, base: Linear) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = linear(base.in_features, 2, bias=False), linear(2, base.out_features, bias=False)
        self.weight, self.bias = base.weight, base.bias  # for those who would read them

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 30 * self.up(self.down(x))


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class Delegate(Wrapper):
    """A wrapper that passes on what it is asked for, so that it seems to be what it wraps."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("part"), name)


CHANGES: dict[str, Callable[[Block], object]] = {
    "a tanh norm before mixing": lambda block: setattr(block, "mixing_norm", TanhNorm(WIDTH)),
    "a tanh norm before the feed-forward layer": lambda block: setattr(block, "feed_forward_norm", TanhNorm(WIDTH)),
    "another activation": lambda block: setattr(block, "feed_forward", TanhFeedForward(WIDTH)),
    "torch's modules": lambda block: setattr(
        block, "feed_forward", nn.Sequential(nn.Linear(WIDTH, 20), nn.ReLU(), nn.Linear(20, WIDTH))
    ),
    "an adapter of the first matrix": lambda block: setattr(
        block.feed_forward, "up", LowRankUpdate(block.feed_forward.up)
    ),
    "an adapter of the second matrix": lambda block: setattr(
        block.feed_forward, "down", LowRankUpdate(block.feed_forward.down)
    ),
    "an adapter of the mixer's matrix": lambda block: setattr(
        block.mixer, "projection", LowRankUpdate(block.mixer.projection)
    ),
    "a parametrised norm": lambda block: parametrize.register_parametrization(
        block.feed_forward_norm, "weight", Doubled()
    ),
    "a parametrised matrix": lambda block: parametrize.register_parametrization(
        block.feed_forward.up, "weight", Doubled()
    ),
    "a mixer behind a delegate": lambda block: setattr(block, "mixer", Delegate(block.mixer)),
    "a feed-forward layer behind a delegate": lambda block: setattr(
        block, "feed_forward", Delegate(block.feed_forward)
    ),
    "a norm behind a delegate": lambda block: setattr(block, "feed_forward_norm", Delegate(block.feed_forward_norm)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["K1", "K2"])
@dtypes
def test_adapters_activations_and_norms_of_others_are_called(change: str, kind: str, dtype: torch.dtype) -> None:
    block, x = make(kind, dtype), hidden(9, dtype)
    before = block(x)[0]
    torch.manual_seed(1)
    CHANGES[change](block)
    block.to(dtype)
    tolerance = 1e-10 if dtype == torch.float64 else 2e-4
    torch.testing.assert_close(block(x)[0], by_modules(block, x), rtol=tolerance, atol=tolerance)
    assert not torch.allclose(block(x)[0], before, rtol=1e-3, atol=1e-3)


def test_hooks_of_all_modules_run() -> None:
    block, seen = make("K2"), []
    with register_module_forward_hook(lambda module, inputs, output: seen.append(type(module))):
        y, _ = block(hidden(5))
    torch.testing.assert_close(y, block(hidden(5))[0], rtol=1e-12, atol=1e-12)
    assert seen.count(RMSNorm) == 2
    assert {K2Mixer, FeedForward, Linear, BaseKernel, K2} <= set(seen)


@blocks
@pytest.mark.parametrize("name", ["mixing_norm", "feed_forward_norm"])
def test_a_norm_that_raises_raises(kind: str, name: str) -> None:
    class Broken(RMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            raise ZeroDivisionError

    block = make(kind)
    setattr(block, name, Broken(WIDTH).double())
    with pytest.raises(ZeroDivisionError):
        block(hidden(3))


@pytest.mark.parametrize("norm", [lambda: TanhNorm(WIDTH), lambda: nn.Sequential(RMSNorm(WIDTH)), UnweightedRMSNorm])
def test_the_read_out_calls_its_norm(norm: Callable[[], nn.Module]) -> None:
    layer, h = K0(WIDTH).double(), hidden(5)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    layer.norm = norm().double()
    torch.testing.assert_close(layer(h), h + layer.gain * layer.norm(h) + layer.bias)


def test_feed_forward_layers_are_branches_without_norm_or_residual() -> None:
    x, gelu = hidden(4), FeedForward(WIDTH, hidden_width=20).double()
    squared = SquaredReluFeedForward(WIDTH, hidden_width=20).double()
    torch.testing.assert_close(
        gelu(x), F.gelu(x @ gelu.up.weight.T + gelu.up.bias) @ gelu.down.weight.T + gelu.down.bias
    )
    torch.testing.assert_close(squared(x), F.relu(x @ squared.up.weight.T) ** 2 @ squared.down.weight.T)


@pytest.mark.parametrize("kind", ["K1", "K2", "transformer", "transformer of K2", "nanochat"])
def test_any_split_gives_the_whole(kind: str) -> None:
    block, x = make(kind), hidden(20)
    start = block.initial_state(2)
    assert isinstance(start, BlockState)
    assert_a_split_gives_the_whole(of_layer(block, x), 20, [0, 7, 7, 19], start=start)
    assert_a_split_gives_the_whole(of_layer(block, x), 20, one_at_a_time(20))


@pytest.mark.parametrize("kind", ["K1", "K2", "transformer"])
def test_dropout_acts_in_training_only_and_where_it_is_asked_for(kind: str) -> None:
    block, x = make(kind), hidden(6)
    whole = block.eval()(x)[0]
    block.mixing_dropout = 1.0
    assert torch.equal(block(x)[0], whole)
    without_mixing = x + block.feed_forward(block.feed_forward_norm(x))
    torch.testing.assert_close(block.train()(x)[0], without_mixing)
    block.mixing_dropout, block.feed_forward.dropout = 0.0, 0.5
    assert not torch.equal(block(x)[0], whole)
    block.feed_forward.eval()  # each part says for itself whether it trains
    torch.testing.assert_close(block(x)[0], whole)


@blocks
def test_drop_path_leaves_branches_out_of_whole_examples(kind: str) -> None:
    block = make(kind).train()
    x = hidden(3)[:1].expand(400, -1, -1)
    block.drop_path = 0.5
    torch.manual_seed(0)
    y = block(x)[0]
    block.drop_path = 0.0
    mixed = block.mixer(block.mixing_norm(x), None)[0]
    outcomes = []
    for scale in (0.0, 2.0):
        h = x + scale * mixed
        outcomes += [h + other * block.feed_forward(block.feed_forward_norm(h)) for other in (0.0, 2.0)]
    matches = torch.stack([(y - outcome).abs().amax((1, 2)) < 1e-9 for outcome in outcomes])
    assert bool((matches.sum(0) == 1).all())
    assert bool((matches.sum(1) > 60).all())  # 100 each are expected


def test_exactly_is_the_type_itself_without_hooks_and_with_its_own_forward() -> None:
    norm = RMSNorm(3)
    assert exactly(norm, RMSNorm)
    assert exactly(norm, Linear, RMSNorm)
    assert not exactly(norm, Linear)
    assert not exactly(norm, nn.Module)
    assert not exactly(TanhNorm(3), RMSNorm)
    assert not exactly(None, RMSNorm)
    assert not exactly(parametrize.register_parametrization(RMSNorm(3), "weight", Doubled()), RMSNorm)
    for register in ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"):
        handle = getattr(norm, f"register_{register}")(lambda *_: None)
        assert not exactly(norm, RMSNorm)
        handle.remove()
        assert exactly(norm, RMSNorm)
    norm.forward = lambda x: x  # type: ignore[method-assign]
    assert not exactly(norm, RMSNorm)
