"""Norms that do not see the scale of their input begin matched to a batch: once, from the run's own seed and data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kmixer.layers import K0
from kmixer.layers.norms import PointwiseNorm, root_mean_square
from kmixer.models import CausalLM, ModelConfig, TransformerConfig
from kmixer.runs.recipe import AnyRecipe
from kmixer.runs.run_folder import RunFolder
from kmixer.training.loop import train
from kmixer.training.norm_matching import match_norms, strength_of_first
from kmixer.training.trainer import Reporter
from tests.training.test_loop import InterruptAfter, assert_same_run, make_recipe

MODELS: dict[str, dict[str, Any]] = {
    "k-stack": {"rank": 3},
    "refined, gelu head": {"rank": 3, "refinement": {"steps": 3}, "head": {"kind": "gelu", "multiplier": 2}},
    "transformer": {"kind": "transformer", "heads": 2},
    "transformer of k2, hierarchical": {"kind": "transformer", "heads": 2, "mixers": ["k2", "hierarchical"]},
}


def make_model(values: dict[str, Any], kind: str, seed: int = 0) -> CausalLM:
    torch.manual_seed(seed)
    config = TransformerConfig if "kind" in values else ModelConfig
    norm = {"kind": kind, "alpha": 0.4, "match": "unit"}
    dropout = {"embedding": 0.5, "mlp": 0.5, "residual": 0.5}
    parsed = config.parse({"width": 32, "layers": 2, "norm": norm, "dropout": dropout, **values}, source="test")
    return CausalLM(parsed, 40)


def tokens() -> Tensor:
    return torch.randint(40, (4, 50), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("kind", ["dyt", "derf"])
@pytest.mark.parametrize("values", MODELS.values(), ids=MODELS.keys())
def test_every_norm_then_gives_out_one(values: dict[str, Any], kind: str) -> None:
    model = make_model(values, kind)
    match_norms(model, lambda: model(tokens()))
    assert model.training
    assert not any(part._forward_pre_hooks for part in model.modules())
    seen: dict[str, tuple[float, float]] = {}

    def note(name: str, part: nn.Module) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            norm = module.norm if isinstance(module, K0) else module
            assert isinstance(norm, PointwiseNorm)
            given = output - inputs[0] if isinstance(module, K0) else output
            strength = norm.alpha.item() * root_mean_square(inputs[0])
            seen.setdefault(name, (strength, given.square().mean().item()))

        return part.register_forward_hook(hook)

    read_outs = [part for part in model.modules() if isinstance(part, K0)]
    watched = {
        name: part
        for name, part in model.named_modules()
        if isinstance(part, K0) or (isinstance(part, PointwiseNorm) and all(part is not k0.norm for k0 in read_outs))
    }
    for name, part in watched.items():
        note(name, part)
    with torch.no_grad():
        model.eval()(tokens())
    assert seen.keys() == watched.keys()
    for strength, power in seen.values():
        assert strength == pytest.approx(0.4, rel=1e-3)
        assert power == pytest.approx(1, rel=0.05)


def test_the_same_weights_and_batch_give_the_same_bits() -> None:
    first, second = (make_model(MODELS["k-stack"], "derf") for _ in range(2))
    for model in (first, second):
        match_norms(model, lambda model=model: model(tokens()))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_hooks_are_gone_where_the_model_raises() -> None:
    model = make_model(MODELS["k-stack"], "dyt")

    def run() -> None:
        raise RuntimeError("the batch")

    with pytest.raises(RuntimeError, match="the batch"):
        match_norms(model, run)
    assert model.training
    assert not any(part._forward_pre_hooks for part in model.modules())


def test_a_small_stream_is_weak_until_it_is_matched() -> None:
    model = make_model(MODELS["k-stack"], "dyt")
    weak = strength_of_first(model, lambda: model(tokens()))
    assert weak == pytest.approx(0.4 * 0.02, rel=0.1)
    match_norms(model, lambda: model(tokens()))
    assert strength_of_first(model, lambda: model(tokens())) == pytest.approx(0.4, rel=1e-3)
    assert strength_of_first(nn.Linear(3, 3), lambda: None) is None


class Warned(Reporter):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def warned(self, line: str) -> None:
        self.lines.append(line)


def recipe_with(text_file: Path, norm: dict[str, Any], **model: Any) -> AnyRecipe:
    recipe = make_recipe(text_file)
    values = recipe.model_dump()
    values["model"] |= {"norm": norm, **model}
    return type(recipe).parse(values, source="test")


@pytest.mark.parametrize(
    ("norm", "model", "warned"),
    [
        ({"kind": "rms"}, {}, False),
        ({"kind": "dyt"}, {}, True),
        ({"kind": "dyt"}, {"embedding_scale": 50.0}, False),
        ({"kind": "derf", "match": "unit"}, {}, False),
    ],
)
def test_training_says_when_branches_begin_weak(
    norm: dict[str, Any], model: dict[str, Any], warned: bool, text_file: Path, tmp_path: Path
) -> None:
    reporter = Warned()
    train(recipe_with(text_file, norm, **model), tmp_path / "run", cpu=True, reporter=reporter)
    assert bool(reporter.lines) == warned
    assert not warned or "branches begin at about 1%" in reporter.lines[0]
    for line in RunFolder(tmp_path / "run").read_metrics():
        if "dynamics" in line:
            assert ("norms" in line["dynamics"]) == (norm["kind"] != "rms")


def test_a_matched_run_starts_matched_and_resumes_unbroken(text_file: Path, tmp_path: Path) -> None:
    norm = {"kind": "dyt", "match": "unit"}
    recipe = recipe_with(text_file, norm)
    first, whole = tmp_path / "first", tmp_path / "whole"
    train(recipe, whole, cpu=True)
    began = next(line["dynamics"]["norms"] for line in RunFolder(whole).read_metrics() if "dynamics" in line)
    strengths = [alpha * size for alpha, size in zip(began["alpha"], began["input"], strict=True)]
    assert strengths == pytest.approx([0.5] * len(strengths), rel=0.1)  # measured on other text

    assert not train(recipe, first, cpu=True, reporter=InterruptAfter(3)).finished
    assert train(recipe, first, cpu=True, resume=True).finished
    assert_same_run(first, whole)
