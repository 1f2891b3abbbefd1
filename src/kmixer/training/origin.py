"""The weights of another model that a run begins with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from kmixer.data.tokenizers import Tokenizer
from kmixer.errors import InputError
from kmixer.models.model_folder import WEIGHTS, find_model_folder, load_tokenizer, load_weights, read_config
from kmixer.runs.recipe import AnyRecipe, LanguageRecipe
from kmixer.runs.run_folder import RunFolder
from kmixer.tensor_files import read_header


@dataclass(frozen=True)
class Origin:
    """Weights to begin with, and the tokenizer that they know."""

    tensors: dict[str, Tensor]
    tokenizer: Tokenizer | None
    source: str  # the file of the weights
    about: dict[str, Any]  # for environment.json


def open_origin(path: Path, recipe: AnyRecipe) -> Origin:
    """The weights of a run folder, a model folder or a packaged model, for a run of this recipe.

    Raises:
        InputError: a folder without a model or with a damaged one, another model or another kind of tokenizer than the
            recipe's.
    """
    folder = find_model_folder(path)
    config = read_config(folder)
    tensors, about = load_weights(folder)
    RunFolder(folder).check_files()
    _check_model(recipe, config.model, path)
    tokenizer = None
    if isinstance(recipe, LanguageRecipe):
        tokenizer = load_tokenizer(folder)
        kind = tokenizer.to_json()["kind"]
        if kind != recipe.tokenizer.kind:
            raise InputError(
                f"--from {path}: its tokenizer is of kind {kind!r}, that of recipe {recipe.name} is "
                f"{recipe.tokenizer.kind!r}; add --set tokenizer.kind={kind}"
            )
    known = {"path": str(folder.resolve()), "weights_sha256": read_header(folder / WEIGHTS)[1], "about": about}
    return Origin(tensors, tokenizer, str(folder / WEIGHTS), known)


def _check_model(recipe: AnyRecipe, theirs: Any, path: Path) -> None:
    """Raises InputError naming the keys in which the models differ: dropout, which has no weights, may."""
    ours = recipe.by_key()
    other = recipe.model_copy(update={"model": theirs}).by_key()
    keys = [key for key in sorted(ours.keys() | other.keys()) if key.startswith("model.")]
    differ = [key for key in keys if ours.get(key) != other.get(key) and "dropout" not in key.split(".")]
    if differ:
        said = "; ".join(f"{key} is {other.get(key)!r} there and {ours.get(key)!r} in the recipe" for key in differ)
        raise InputError(f"--from {path} holds another model than recipe {recipe.name}: {said}")
