"""Which norms stand in a model, what they cost in parameters, and that models without a choice are as they were."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import kmixer
from kmixer.errors import InputError
from kmixer.layers.norms import PointwiseNorm
from kmixer.models import CausalLM
from kmixer.models.classifiers import build_classifier
from kmixer.models.model_folder import Model
from kmixer.runs.recipe import LanguageRecipe, load_recipe, packaged_recipes

AS_BEFORE = json.loads((Path(__file__).parent / "models_with_rms_norms.json").read_text())


def model_of(recipe: str, *settings: str) -> Model:
    loaded = load_recipe(recipe, list(settings))
    if isinstance(loaded, LanguageRecipe):
        return CausalLM(loaded.model, loaded.tokenizer.vocabulary_size)
    return build_classifier(loaded.model)  # type: ignore[attr-defined]


@pytest.mark.parametrize("recipe", packaged_recipes())
def test_recipes_have_the_parameters_that_they_had_before_norms_could_be_chosen(recipe: str) -> None:
    if recipe not in AS_BEFORE["parameters"]:
        pytest.skip("a later recipe")
    with torch.device("meta"):
        model = model_of(recipe)
    names = "\n".join(f"{name} {tuple(tensor.shape)}" for name, tensor in model.state_dict().items())
    digest = hashlib.sha256(names.encode()).hexdigest()[:16]
    assert [sum(p.numel() for p in model.parameters()), digest] == AS_BEFORE["parameters"][recipe]


@pytest.mark.parametrize("recipe", AS_BEFORE["losses"])
def test_recipes_have_the_loss_that_they_had(recipe: str) -> None:
    torch.manual_seed(5)
    model = model_of(recipe).double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        if isinstance(model, CausalLM):
            x = torch.randint(model.vocabulary_size, (2, 33), generator=generator)
            value = model(x[:, :-1], targets=x[:, 1:]).losses.mean()
        elif model.config.kind == "vit":
            value = model(torch.rand(3, 1, 8, 8, generator=generator)).square().mean()
        else:
            value = model(torch.randint(1, model.config.vocabulary, (2, 40), generator=generator)).square().mean()
    assert float(value) == pytest.approx(AS_BEFORE["losses"][recipe], rel=1e-13)


# Of a K-Stack of d = 64 with 6 K2 layers: 16 norms of blocks and the last have a gain, that of K0 has none.
@pytest.mark.parametrize(
    ("settings", "added"),
    [
        (["model.norm.kind=dyt"], 17 * 1 + 1 - 64),
        (["model.norm.kind=derf"], 17 * 2 + 2 - 64),
        (["model.norm.kind=dyt", "model.norm.bias=true"], 17 * 65 + 1 - 64),
        (["model.norm.kind=derf", "model.norm.final=rms"], 16 * 2),
        (["model.norm.kind=dyt", "model.embedding_scale=50.0"], 17 + 1 - 64 + 1),
        (["model.norm.kind=layer"], -64),
    ],
)
def test_parameters_of_a_k_stack(settings: list[str], added: int) -> None:
    with torch.device("meta"):
        counts = [sum(p.numel() for p in model_of("shakespeare-quick", *more).parameters()) for more in ([], settings)]
    assert counts[1] - counts[0] == added


# Four layers: 9 norms with weight and bias in vision (d = 64); in nanochat 9 and that of the embedding, without.
@pytest.mark.parametrize(
    ("recipe", "kind", "added"),
    [
        ("vit-digits", "rms", -9 * 64),
        ("vit-digits", "dyt", 9),
        ("vit-digits", "derf", 9 * 2),
        ("transformer-plays", "layer", 0),
        ("transformer-plays", "dyt", 10),
        ("transformer-plays", "derf", 20),
    ],
)
def test_parameters_of_other_stacks(recipe: str, kind: str, added: int) -> None:
    with torch.device("meta"):
        counts = [
            sum(p.numel() for p in model_of(recipe, *more).parameters()) for more in ([], [f"model.norm.kind={kind}"])
        ]
    assert counts[1] - counts[0] == added


@pytest.mark.parametrize("recipe", ["shakespeare-quick", "transformer-plays", "vit-digits", "listops"])
@pytest.mark.parametrize("kind", ["dyt", "derf"])
def test_every_norm_of_a_stack_is_chosen(recipe: str, kind: str) -> None:
    with torch.device("meta"):
        model = model_of(recipe, f"model.norm.kind={kind}")
    parts = [(name, part) for name, part in model.named_modules() if not isinstance(part, nn.Identity)]
    there = [name for name, _ in parts if name.split(".")[-1].endswith("norm")]
    chosen = [name for name, part in model.named_modules() if isinstance(part, PointwiseNorm)]
    assert chosen == [name for name in there if "mixer" not in name]
    assert len(chosen) >= 5
    assert not any(isinstance(part, nn.LayerNorm) for part in model.modules())


def test_alphas_begin_by_place() -> None:
    settings = ["model.norm.kind=dyt", "model.norm.alpha={mixing=0.8, feed_forward=0.2, final=0.1}"]
    model = model_of("shakespeare-quick", *settings)
    alphas = {name: p.item() for name, p in model.named_parameters() if name.endswith("alpha")}
    assert {round(alphas[name], 6) for name in alphas if "mixing_norm" in name} == {0.8}
    assert {round(alphas[name], 6) for name in alphas if "feed_forward_norm" in name} == {0.2}
    assert {round(alphas[name], 6) for name in ("norm.alpha", "stack.read_out.norm.alpha")} == {0.1}


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (["model.norm.alpha=0.5"], "norm.alpha goes with kind 'dyt' or 'derf'; 'rms' has none"),
        (["model.norm.kind=layer", "model.norm.match=unit"], "norm.match goes with kind 'dyt' or 'derf'"),
        (["model.norm.kind=dyt", "model.norm.alpha=-0.5"], "greater than 0"),
        (["model.norm.kind=batch"], "got 'batch'; allowed: 'rms', 'layer', 'dyt' or 'derf'"),
        (["model.norm.kind=dyt", "model.norm.match=true"], "allowed: 'none' or 'unit'"),
        (["model.embedding_scale=-1.0"], "greater than or equal to 0"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(settings: list[str], problem: str) -> None:
    with pytest.raises(InputError, match=problem) as raised:
        load_recipe("shakespeare-quick", settings)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("norm", [{"kind": "dyt"}, {"kind": "derf", "bias": True}, {"kind": "layer"}])
@pytest.mark.parametrize(
    "model", [{"rank": 3}, {"kind": "transformer", "heads": 2}, {"kind": "transformer", "mixers": ["k2"]}]
)
def test_a_model_with_other_norms_streams_is_saved_and_generates(
    norm: dict[str, Any], model: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    kind = kmixer.models.ModelConfig if "kind" not in model else kmixer.models.TransformerConfig
    values = {"width": 16, "layers": 2, "norm": norm, "embedding_scale": 20.0, **model}
    exact = kmixer.LanguageModel(kind.parse(values, source="test"), 11).eval()
    tokens = torch.randint(11, (2, 30))
    whole = exact(tokens)
    first = exact(tokens[:, :13])
    second = exact(tokens[:, 13:], first.state)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole.logits, rtol=1e-4, atol=1e-5)
    again = CausalLM(exact.config, 11)
    again.load_state_dict(exact.state_dict())
    assert torch.equal(again.eval()(tokens).logits, whole.logits)
    generated = exact.generate(tokens[:1], 12, temperature=0.0)
    row = tokens[:1]
    for _ in range(12):
        row = torch.cat([row, exact(row).logits[:, -1:].argmax(-1)], dim=1)
    assert generated.flatten().tolist()[-12:] == row[0, -12:].tolist()
