"""kmixer recipes and kmixer params: what there is, and how large it is."""

from __future__ import annotations

import json

import torch

from kmixer.cli.options import Json, RecipeName, Settings
from kmixer.experiments.sweep import load_ablation, packaged_ablations
from kmixer.models.causal_lm import CausalLM, count_parameters
from kmixer.training.recipe import load_recipe, packaged_recipes


def recipes(as_json: Json = False) -> None:
    """List the packaged recipes, and the ablations for kmixer sweep.

    Example: kmixer recipes
    """
    described = {name: load_recipe(name).description for name in packaged_recipes()}
    described |= {name: load_ablation(name).description for name in packaged_ablations()}
    if as_json:
        print(json.dumps(described, indent=2))
        return
    for name, description in described.items():
        print(f"{name:32}{description}")


def params(recipe: RecipeName, settings: Settings = None, as_json: Json = False) -> None:
    """Count the parameters of a recipe's model, by part, without making it.

    Example: kmixer params k-operators-v2-shakespeare --json
    """
    loaded = load_recipe(recipe, settings)
    with torch.device("meta"):
        parts = count_parameters(CausalLM(loaded.model, loaded.tokenizer.vocabulary_size))
    total = sum(parts.values())
    if as_json:
        print(json.dumps({"total": total, "parts": parts}))
        return
    for name, count in parts.items():
        print(f"{name:18}{count:>14,}")
    print(f"{'total':18}{total:>14,}")
