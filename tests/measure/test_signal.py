"""The estimator of growing gradients against exact Jacobians, on every kind of model; what it leaves behind."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kmixer.errors import InputError
from kmixer.layers import Derf, DyT, SoftmaxAttention
from kmixer.measure.mean_field import agreement, predict
from kmixer.measure.signal import blocks_of, measure_stream, summarise, symmetric_inputs
from kmixer.measure.signal_theory import advise, norm_map, scores_too_large, theory_blocks, weak_branches
from kmixer.models import CausalLM, ModelConfig
from kmixer.models.classifiers import build_classifier
from kmixer.models.mixers.registry import CAUSAL_NAMES
from kmixer.models.sequence_classifier import SequenceClassifierConfig
from kmixer.models.transformer import TransformerConfig
from kmixer.models.vision import VisionConfig

KERNELS: list[dict[str, Any]] = [{"kind": "conv", "size": 4, "shared": True}, {"kind": "dense", "size": 16}]


def transformer(width: int = 16, layers: int = 3, seed: int = 0, **model: Any) -> CausalLM:
    torch.manual_seed(seed)
    values = {"kind": "transformer", "width": width, "layers": layers, "heads": 2, **model}
    return CausalLM(TransformerConfig.parse(values, source="test"), 84)


def k_stack(**model: Any) -> CausalLM:
    torch.manual_seed(0)
    return CausalLM(ModelConfig.parse({"width": 16, "layers": 3, "rank": 4, **model}, source="test"), 84)


def vision() -> nn.Module:
    torch.manual_seed(0)
    values = {"image_size": 8, "patch_size": 4, "channels": 1, "classes": 3, "width": 16, "layers": 3, "heads": 2}
    return build_classifier(VisionConfig.parse(values, source="test"))


def classifier(**model: Any) -> nn.Module:
    torch.manual_seed(0)
    values = {"vocabulary": 84, "length": 8, "classes": 3, "width": 16, "layers": 3, "heads": 2, **model}
    return build_classifier(SequenceClassifierConfig.parse(values, source="test"))


def tokens(b: int = 2, t: int = 6) -> Tensor:
    return 1 + torch.stack([torch.randperm(83, generator=torch.Generator().manual_seed(i))[:t] for i in range(b)])


MODELS: dict[str, Callable[[], nn.Module]] = {
    **{f"transformer-{mixer}": lambda mixer=mixer: transformer(mixers=[mixer]) for mixer in CAUSAL_NAMES},  # type: ignore[misc]
    "nanochat": lambda: transformer(blocks="nanochat", softmax={"query_key_norm": True}, value_embeddings=True),
    "k-stack": lambda: k_stack(base_kernel=KERNELS[0], output_gate=True),
    "k-stack-dense": lambda: k_stack(base_kernel=KERNELS[1]),
    "refined": lambda: k_stack(refinement={"steps": 3}),
    "copies": lambda: k_stack(copy_memory={"layers": "all"}),
    "k-stack-derf": lambda: k_stack(norm={"kind": "derf"}),
    "nanochat-dyt": lambda: transformer(blocks="nanochat", norm={"kind": "dyt"}),
    "layer": lambda: transformer(norm={"kind": "layer"}),
    "fast-weights": lambda: transformer(fast_weights={"chunk": 2}),
    "classifier": classifier,
    "class-token": lambda: classifier(pooling="class", causal=False),
    "classifier-sinkhorn": lambda: classifier(mixers=["sinkhorn"], causal=False),
    "vision": vision,
}


def inputs_of(model: nn.Module) -> Tensor:
    if isinstance(model, CausalLM) or hasattr(model, "embedding"):
        return tokens()
    return torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", MODELS)
def test_every_model_is_measured_and_left_as_it_was(name: str) -> None:
    model = MODELS[name]().train()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    asked = [parameter.requires_grad for parameter in model.parameters()]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    stream = measure_stream(model, inputs_of(model))
    depth = len(blocks_of(model)) + 1
    assert stream.growth.shape == stream.size.shape == stream.cosine.shape == (2, depth)
    assert stream.growth[:, -1].tolist() == [1, 1]
    assert bool((stream.growth > 0).all() and stream.growth.isfinite().all())
    assert model.training
    assert [parameter.requires_grad for parameter in model.parameters()] == asked
    assert all(bool((parameter.grad == 1).all()) for parameter in model.parameters())  # type: ignore[union-attr]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    again = measure_stream(model, inputs_of(model))
    assert torch.equal(stream.growth, again.growth)


def exact(model: CausalLM, row: Tensor) -> list[float]:
    """J(L, l) by whole Jacobians, from the definition: the last blocks as a function of the stream before them."""
    stream = measure_stream(model, row, probes=1)
    blocks, kernel = blocks_of(model), getattr(model.stack, "shared_kernel", None)
    model.eval()
    values = []
    for layer in range(len(blocks)):
        count = stream.hidden[layer].numel()
        h = start = stream.hidden[layer].repeat(count, 1, 1).requires_grad_()
        for block in blocks[layer:]:
            inside = kernel is not None and block not in (blocks[0], blocks[-1])
            h = block(h, None, *((kernel,) if inside else ()))[0]
        # Of copy i of the sequence output i alone.
        (jacobian,) = torch.autograd.grad(torch.diagonal(h.flatten(1)).sum(), start)
        values.append(float(jacobian.double().square().sum()) / count)
    return values


@pytest.mark.parametrize("make", [lambda: transformer(width=12), lambda: k_stack(width=12, base_kernel=KERNELS[0])])
def test_random_signs_give_the_exact_jacobian(make: Callable[[], CausalLM]) -> None:
    """For every layer, from one backward pass a probe."""
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():  # away from the identity
            if parameter.ndim == 2:
                parameter.mul_(6)
    rows = tokens(1)
    draws = measure_stream(model, rows.repeat(400, 1), probes=1).growth  # the signs of every row are its own
    error = draws.std(0) / math.sqrt(len(draws))
    for layer, expected in enumerate(exact(model, rows)):
        assert float(draws[:, layer].mean()) == pytest.approx(expected, abs=4 * float(error[layer]) + 1e-5)


def test_probes_are_averaged() -> None:
    model = transformer()
    one = measure_stream(model, tokens(), probes=1).growth
    three = measure_stream(model, tokens(), probes=3).growth
    assert not torch.equal(one, three)
    assert torch.allclose(one, three, rtol=0.5)


def test_hooks_are_removed_after_an_error() -> None:
    model = transformer()

    def fail(*_: Any) -> None:
        raise RuntimeError("broken")

    handle = model.stack.blocks[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="broken"):
        measure_stream(model, tokens())
    handle.remove()
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.training


def test_a_compiled_model_is_measured_in_its_parts() -> None:
    plain, compiled = transformer(), transformer()
    compiled.compile_layers("eager")
    assert torch.equal(measure_stream(plain, tokens()).growth, measure_stream(compiled, tokens()).growth)


def test_a_read_out_is_one_block_more() -> None:
    model = k_stack()
    without, with_it = (measure_stream(model, tokens(), read_out=read_out).growth for read_out in (False, True))
    assert with_it.shape[1] == without.shape[1] + 1
    with pytest.raises(InputError, match="only a K-Stack"):
        measure_stream(transformer(), tokens(), read_out=True)


def test_rows_with_padding_are_refused() -> None:
    rows = tokens()
    rows[0, -2:] = 0
    with pytest.raises(InputError, match="rows of one length"):
        measure_stream(classifier(), rows)


def test_symmetric_inputs_have_their_products() -> None:
    stream = measure_stream(transformer(), tokens(), enter=symmetric_inputs(1.5, 0.3, 0))
    assert torch.allclose(stream.covariance, torch.full((6, 6), 0.3).double() + 1.2 * torch.eye(6), atol=1e-5)
    assert stream.cosine[:, 0].tolist() == pytest.approx([0.2, 0.2], abs=1e-5)
    with pytest.raises(InputError, match="as many channels"):
        measure_stream(transformer(), tokens(2, 20), enter=symmetric_inputs(1.0, 0.2, 0))
    with pytest.raises(InputError, match="allowed: from -q"):
        measure_stream(transformer(), tokens(), enter=symmetric_inputs(1.0, -0.3, 0))


def test_the_error_is_over_initialisations_or_over_inputs() -> None:
    streams = [measure_stream(transformer(seed=seed), tokens(3)) for seed in range(4)]
    several, one = summarise(streams), summarise(streams[:1])
    assert (several["draws"], one["draws"]) == (4, 3)
    log = torch.stack([stream.growth.mean(0) for stream in streams]).log()
    assert several["log_growth"] == pytest.approx(log.mean(0).tolist())
    assert several["log_growth_error"] == pytest.approx((log.std(0) / 2).tolist())
    assert sum(several["log_by_block"]) == pytest.approx(several["log_growth"][0])
    assert math.prod([several["first_block"], math.exp(several["log_growth"][1])]) == pytest.approx(several["total"])


def test_a_transformer_at_its_beginning_grows_as_in_theory() -> None:
    """Causal softmax attention, GELU, width 64, 6 layers, 64 different tokens: J within 10 %, layer by layer."""
    streams, predicted = [], []
    for seed in range(6):
        model = transformer(64, 6, seed, heads=4)
        streams.append(measure_stream(model, tokens(2, 64), seed=seed))
        blocks = theory_blocks(model, 64)
        assert not isinstance(blocks, str)
        predicted.append(predict(blocks, streams[-1].covariance).growth.mean(0).log())
    measured, theory = summarise(streams)["log_growth"], torch.stack(predicted).mean(0).tolist()
    assert scores_too_large(model, streams[-1].hidden) is None
    assert [math.exp(a - b) for a, b in zip(measured, theory, strict=True)] == pytest.approx([1] * 7, rel=0.1)
    assert agreement(measured, theory) < 1.05
    of_equal_sizes = predict(blocks, 4e-4 * torch.eye(64)[None]).growth[0].tolist()
    assert of_equal_sizes == pytest.approx([13.82, 4.01, 2.39, 1.74, 1.38, 1.16, 1], rel=0.03)


@pytest.mark.parametrize("kind", ["dyt", "derf"])
@pytest.mark.parametrize("alpha", [0.3, 0.9])
def test_bounded_norms_grow_as_in_theory(kind: str, alpha: float) -> None:
    """Inputs of variance 1, weights larger than at the beginning: within three errors and 3 %, every layer."""
    streams, predicted = [], []
    for seed in range(6):
        model = transformer(64, 6, seed, heads=4, norm={"kind": kind, "alpha": alpha})
        with torch.no_grad():
            for name, parameter in model.stack.named_parameters():
                if parameter.ndim == 2 and "query_key" not in name:
                    parameter.mul_(6)
        streams.append(measure_stream(model, tokens(2, 16), seed=seed, enter=symmetric_inputs(1.0, 0.2, seed)))
        blocks = theory_blocks(model, 16)
        assert not isinstance(blocks, str)
        predicted.append(predict(blocks, streams[-1].covariance).growth.mean(0).log())
    measured, theory = summarise(streams), torch.stack(predicted).mean(0).tolist()
    assert measured["total"] > 1.2
    for log, error, expected in zip(measured["log_growth"], measured["log_growth_error"], theory, strict=True):
        assert log == pytest.approx(expected, abs=3 * error + 0.03)


@pytest.mark.parametrize(
    "name", ["transformer-softmax", "vision", "class-token", "classifier", "layer", "nanochat-dyt"]
)
def test_theory_has_the_blocks_of_attention(name: str) -> None:
    model = MODELS[name]()
    stream = measure_stream(model, inputs_of(model))
    blocks = theory_blocks(model, stream.covariance.shape[-1])
    assert not isinstance(blocks, str)
    assert predict(blocks, stream.covariance).growth.shape == stream.growth.shape


MEASURED_ONLY = {
    **{f"transformer-{mixer}": "depend on what it mixes" for mixer in CAUSAL_NAMES if mixer != "softmax"},
    "classifier-sinkhorn": "depend on what it mixes",
    "k-stack": "K2Mixer",
    "copies": "copy memory",
    "fast-weights": "no feed-forward layer that the theory knows",
    "nanochat": "depend on what it mixes",  # of value embeddings
}


@pytest.mark.parametrize("name", MEASURED_ONLY)
def test_where_theory_does_not_apply_it_says_why(name: str) -> None:
    reason = theory_blocks(MODELS[name](), 6)
    assert isinstance(reason, str)
    assert MEASURED_ONLY[name] in reason


def test_scores_of_order_one_are_out_of_theory() -> None:
    model = transformer(blocks="nanochat", softmax={"query_key_norm": True})
    assert not isinstance(theory_blocks(model, 6), str)
    reason = scores_too_large(model, measure_stream(model, tokens()).hidden)
    assert reason is not None
    assert "layer 1" in reason


def test_scales_of_the_stream_that_have_moved_are_out_of_theory() -> None:
    model = transformer(blocks="nanochat")
    with torch.no_grad():
        model.stack.input_scale[1] = 0.5
    assert theory_blocks(model, 6) == "input_scale is not 0"


@pytest.mark.parametrize(("causal", "window"), [(True, None), (True, 3), (False, None)])
def test_the_fixed_mixing_is_that_of_equal_scores(causal: bool, window: int | None) -> None:
    torch.manual_seed(0)
    layer = SoftmaxAttention(8, 2, causal=causal, window=window, rotary=False)
    mixing = layer.fixed_mixing(7)
    assert mixing is not None
    matrices = (layer.out.weight.detach(), layer.query_key_value.weight.detach()[16:])
    assert mixing.strength == pytest.approx(math.prod(float(8 * matrix.square().mean()) for matrix in matrices))
    with torch.no_grad():
        layer.query_key_value.weight[:16] = 0
    assert torch.allclose(layer.attention_weights(torch.randn(1, 7, 8))[0, 0], mixing.weights)


def test_a_norm_that_is_not_known_has_no_map() -> None:
    assert norm_map(nn.Identity()) is None
    norm = norm_map(nn.LayerNorm(4))
    assert norm is not None
    assert (norm.kind, norm.gain) == ("standard", 1.0)
    assert norm_map(nn.LayerNorm(4, elementwise_affine=False)) == norm
    layer = Derf(4, 0.3)
    with torch.no_grad():
        layer.shift.fill_(0.25)  # type: ignore[union-attr]
        layer.gain.fill_(2)  # type: ignore[union-attr]
    assert norm_map(layer) == pytest.approx(("erf", 0.3, 0.25, 2.0))
    assert norm_map(DyT(4, 0.7, gain=False)) == pytest.approx(("tanh", 0.7, 0.0, 1.0))
    model = transformer()
    model.stack.blocks[2].feed_forward_norm = nn.Identity()
    assert theory_blocks(model, 6) == "Identity is no norm that the theory knows"


def bounded(alpha: float) -> list[Any]:
    blocks = theory_blocks(transformer(64, 6, norm={"kind": "derf", "alpha": alpha}), 16)
    assert not isinstance(blocks, str)
    return blocks


def test_weak_branches_are_warned_of() -> None:
    assert weak_branches(bounded(0.5), [1.0] * 7) is None
    warning = weak_branches(bounded(0.5), [4e-4] * 7)
    assert warning is not None
    assert "block 1 start at 1.1% of RMSNorm's" in warning


def test_alpha_is_advised_for_bounded_norms_alone() -> None:
    covariance = 0.3 + 0.7 * torch.eye(16, dtype=torch.float64)
    blocks = bounded(0.5)
    alpha = advise(blocks, covariance)
    assert alpha is not None

    def growth(**norm: Any) -> float:
        changed = blocks[0].mixing_norm._replace(**norm)
        of_norm = [block._replace(mixing_norm=changed, feed_forward_norm=changed) for block in blocks]
        return float(predict(of_norm, covariance[None]).growth[0, 0])

    standard = growth(kind="standard", alpha=1.0)
    assert growth(alpha=alpha) <= standard
    assert alpha == 2.0 or growth(alpha=alpha + 0.05) > standard
    plain = theory_blocks(transformer(64, 6), 16)
    assert not isinstance(plain, str)
    assert advise(plain, covariance) is None
