"""The weights of another model that a run begins with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from kmixer.data.tokenizers import Tokenizer
from kmixer.errors import InputError, shown_name
from kmixer.models.model_folder import (
    WEIGHTS,
    find_model_folder,
    load_tokenizer,
    load_weights,
    put_weights,
    read_config,
)
from kmixer.runs.recipe import AnyRecipe, ClassificationRecipe, LanguageRecipe
from kmixer.runs.run_folder import RunFolder
from kmixer.tensor_files import read_header


@dataclass(frozen=True)
class Origin:
    """Weights to begin with, and the tokenizer that they know."""

    path: Path  # as it was given
    recipe: AnyRecipe  # of the run that begins
    tensors: dict[str, Tensor]
    tokenizer: Tokenizer | None
    source: str  # the file of the weights
    changed: list[str]  # what of the model's settings is another now, dropout aside
    about: dict[str, Any]  # for environment.json

    def put_into(self, model: nn.Module) -> list[str]:
        """Give a fresh model these weights by name; the names of the tensors that stay fresh, as they are not there.

        Raises:
            InputError: a tensor that the model does not have, or has in another shape; see also `put_weights`.
        """
        own = model.state_dict()
        for name, tensor in sorted(self.tensors.items()):
            if name in own and own[name].shape == tensor.shape:
                continue
            misfit = f"tensor {shown_name(name)} of shape {tuple(tensor.shape)} " + (
                f"is of {tuple(own[name].shape)} here" if name in own else "does not belong to this model"
            )
            raise _another_model(self.path, self.recipe, [*self.changed, misfit])
        kind = next((tensor.dtype for tensor in self.tensors.values() if tensor.is_floating_point()), None)
        fresh = {name: tensor for name, tensor in own.items() if name not in self.tensors}
        alike = {name: tensor.to(kind) if tensor.is_floating_point() else tensor for name, tensor in fresh.items()}
        put_weights(model, self.tensors | alike, self.source)
        return list(fresh)


def open_origin(path: Path, recipe: AnyRecipe) -> Origin:
    """The weights of a run folder, a model folder or a packaged model, for a run of this recipe.

    Raises:
        InputError: a folder without a model or with a damaged one, another kind of model or of tokenizer than the
            recipe's.
    """
    folder = find_model_folder(path)
    config = read_config(folder)
    tensors, about = load_weights(folder)
    RunFolder(folder).check_files()
    changed = _changed(recipe, config.model)
    assert isinstance(recipe, LanguageRecipe | ClassificationRecipe)
    if type(config.model) is not type(recipe.model):
        raise _another_model(path, recipe, changed)
    tokenizer = None
    if isinstance(recipe, LanguageRecipe):
        tokenizer = load_tokenizer(folder)
        kind = tokenizer.to_json()["kind"]
        if kind != recipe.tokenizer.kind:
            raise InputError(
                f"--from {path}: its tokenizer is of kind {kind!r}, that of recipe {recipe.name} is "
                f"{recipe.tokenizer.kind!r}; add --set tokenizer.kind={kind}"
            )
    known = {"path": str(folder.resolve()), "weights_sha256": weights_digest(folder), "about": about}
    return Origin(path, recipe, tensors, tokenizer, str(folder / WEIGHTS), changed, known)


def _another_model(path: Path, recipe: AnyRecipe, said: list[str]) -> InputError:
    return InputError(f"--from {path} holds another model than recipe {recipe.name}: {'; '.join(said)}")


def weights_digest(folder: Path) -> str:
    """The sha256 that a model folder's weights are known by."""
    return read_header(folder / WEIGHTS)[1]


def recipe_of_origin(path: Path, settings: list[str]) -> AnyRecipe:
    """The recipe of a run that training goes on from, changed by settings. Raises InputError where it has none."""
    run = RunFolder(path)
    if not run.exists():
        find_model_folder(path)
        raise InputError(f"--from {path} has no recipe beside its weights; name one: kmixer train RECIPE --from {path}")
    return run.changed_recipe(settings)


def check_same_origin(run: RunFolder, path: Path) -> None:
    """Raises InputError where a run to be resumed did not begin with these weights."""
    began = run.environment().get("from")
    if not isinstance(began, dict) or began.get("weights_sha256") != weights_digest(find_model_folder(path)):
        raise InputError(
            f"--from {path} --resume: {run.path} did not begin with these weights; leave --from out to go on with it, "
            "or choose another --out"
        )


def _changed(recipe: AnyRecipe, theirs: Any) -> list[str]:
    """The model's settings that differ, in words: dropout, which has no weights, may. A new section is one of them."""
    ours = recipe.by_key()
    other = recipe.model_copy(update={"model": theirs}).by_key()
    said = []
    for here, there, word in ((ours, other, "new"), (other, ours, "there only")):
        for section in (key for key, value in there.items() if value is None and key not in here):
            inner = [key for key in here if key.startswith(f"{section}.")]
            said += [f"{section} is {word}"] if inner else []
            for key in inner:
                del here[key]
    keys = [key for key in sorted(ours.keys() | other.keys()) if key.startswith("model.")]
    differ = [key for key in keys if ours.get(key) != other.get(key) and "dropout" not in key.split(".")]
    return said + [f"{key} is {other.get(key)!r} there and {ours.get(key)!r} in the recipe" for key in differ]
