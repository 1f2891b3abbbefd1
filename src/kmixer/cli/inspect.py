"""kmixer recipes, params and flops: what there is, how large it is, and what it costs."""

from __future__ import annotations

import itertools
import json
from typing import Annotated

import typer

from kmixer.cli.options import Json, RecipeName, Settings
from kmixer.experiments.sweep import load_ablation, packaged_ablations, read_ablation
from kmixer.models.accounting import Account, account_classifier, account_language
from kmixer.runs.recipe import (
    ClassificationRecipe,
    as_language,
    load_recipe,
    packaged_recipes,
    read_recipe_file,
)

Beside = Annotated[str | None, typer.Option("--beside", help="Another recipe, to compare with.")]


def recipes(
    name: Annotated[str | None, typer.Argument(help="One of them, or a .toml file, to print whole.")] = None,
    as_json: Json = False,
) -> None:
    """List the packaged recipes, and the ablations for kmixer sweep; or print one, to read or to begin from.

    A recipe is printed with every key, at its default where the file says nothing.

    Example: kmixer recipes shakespeare-quick > mine.toml
    """
    if name in packaged_ablations():
        _print_ablation(name, as_json)
        return
    if name is not None:
        _print_recipe(name, as_json)
        return
    described = {name: load_recipe(name).description for name in packaged_recipes()}
    described |= {name: load_ablation(name).description for name in packaged_ablations()}
    if as_json:
        print(json.dumps(described, indent=2))
        return
    width = max(map(len, described)) + 2
    for name, description in described.items():
        print(f"{name:{width}}{description}")


def _print_ablation(name: str, as_json: bool) -> None:
    print(json.dumps(load_ablation(name).model_dump(), indent=2) if as_json else read_ablation(name).rstrip())


def _print_recipe(name: str, as_json: bool) -> None:
    recipe = load_recipe(name)
    if as_json:
        print(json.dumps(recipe.model_dump(), indent=2))
        return
    comments = itertools.takewhile(lambda line: line.startswith("#"), read_recipe_file(name).splitlines())
    print("".join(f"{line}\n" for line in comments) + recipe.to_toml().rstrip())
    if unset := [key for key, value in recipe.by_key().items() if value is None]:  # TOML cannot write them
        print(f"\n# Keys without a value: {', '.join(unset)}")


def params(recipe: RecipeName, settings: Settings = None, beside: Beside = None, as_json: Json = False) -> None:
    """Count the parameters of a recipe's model, by part, without making it.

    Example: kmixer params gka-d20 --beside nanochat-d20
    """
    ours = account_of(recipe, settings)
    parts, total = ours.parameters, ours.total_parameters
    if beside is None:
        if as_json:
            print(json.dumps({"total": total, "parts": parts}))
            return
        for name, count in parts.items():
            print(f"{name:24}{count:>14,}")
        print(f"{'total':24}{total:>14,}")
        return
    other = account_of(beside, None)
    names = list(dict.fromkeys([*parts, *other.parameters]))
    saved = other.total_parameters - total
    shares = {name: other.parameters.get(name, 0) - parts.get(name, 0) for name in names}
    if as_json:
        theirs = {"total": other.total_parameters, "parts": other.parameters}
        print(json.dumps({recipe: {"total": total, "parts": parts}, beside: theirs, "difference": shares}))
        return
    print(f"{'':24}{recipe:>18}{beside:>18}{'difference':>16}")
    for name in names:
        share = f"   {shares[name] / saved:7.1%} of it" if saved and shares[name] else ""
        print(f"{name:24}{parts.get(name, 0):>18,}{other.parameters.get(name, 0):>18,}{shares[name]:>16,}{share}")
    ratio = total / other.total_parameters
    print(f"{'total':24}{total:>18,}{other.total_parameters:>18,}{saved:>16,}   {recipe} is {ratio:.4f} of {beside}")
    tables = other.parameters.get("stack.value_embeddings", 0) - parts.get("stack.value_embeddings", 0)
    if tables:
        left = other.total_parameters - tables
        print(f"without the value embeddings of {beside}: {left:,}, of which {recipe} is {total / left:.3f}")
    print(
        f"trained {ours.unit}s a parameter of the matrices of blocks and head: {recipe} "
        f"{ours.trained_units / ours.matrix_parameters:.2f}, "
        f"{beside} {other.trained_units / other.matrix_parameters:.2f}"
    )


def flops(recipe: RecipeName, settings: Settings = None, beside: Beside = None, as_json: Json = False) -> None:
    """Count floating-point operations and the bytes of the state, without making the model.

    Example: kmixer flops gka-d20 --beside nanochat-d20
    """
    accounts = {recipe: account_of(recipe, settings)}
    if beside is not None:
        accounts[beside] = account_of(beside, None)
    if as_json:
        shown = {name: account.to_json() for name, account in accounts.items()}
        print(json.dumps(shown if beside is not None else shown[recipe]))
        return
    unit = accounts[recipe].unit
    an_unit = "an image" if unit == "image" else f"a {unit}"
    rows = {
        f"training FLOPs {an_unit} *": lambda a: f"{a.training_flops:.4e}",
        "training FLOPs": lambda a: f"{a.total_training_flops:.4e}",
        f"trained {unit}s": lambda a: f"{a.trained_units:,}",
        f"forward FLOPs {an_unit} **": lambda a: f"{a.forward_flops:.4e}",
        "cache, bytes per token": lambda a: f"{a.cache_bytes_per_token:,}",
        "constant state, bytes": lambda a: f"{a.constant_state_bytes:,}",
        "parameters": lambda a: f"{a.total_parameters:,}",
    }
    print(f"{'':28}" + "".join(f"{name:>20}" for name in accounts))
    for label, cell in rows.items():
        print(f"{label:28}" + "".join(f"{cell(account):>20}" for account in accounts.values()))
    positions = " and ".join(str(count) for count in dict.fromkeys(account.positions for account in accounts.values()))
    print(f"* as papers count at {positions} positions: 3 forward passes, every position against all keys of its layer")
    print(
        "** what a position really sees. State and cache in bfloat16, remembered tokens in int64; a layer's cache ends "
        "at its window."
    )


def account_of(recipe: str, settings: list[str] | None = None) -> Account:
    """What a recipe's model and training cost."""
    loaded = load_recipe(recipe, settings)
    units = loaded.training.steps * loaded.units_per_step
    if isinstance(loaded, ClassificationRecipe):
        return account_classifier(loaded.model, examples=units)
    language = as_language(loaded)
    window = language.training.window
    return account_language(language.model, language.tokenizer.vocabulary_size, window=window, tokens=units)
