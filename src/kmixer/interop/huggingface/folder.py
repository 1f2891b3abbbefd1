"""A Hugging Face folder: what is written of a run or a model, what is read of it, and back. transformers is not needed.

config.json, generation_config.json         the model, as `KMixerConfig` has it
model.safetensors                           our names below "model."
tokenizer.json, tokenizer_config.json       for the tokenizers library; ours under "kmixer"
README.md                                   the card
kmixer/                                     the run's other files as they are, and weights.json: what its file of
                                            weights says of itself, by which damage is noticed

What transformers has written has no kmixer/: it is a model, of which no run tells.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from kmixer.data.corpora import CORPORA
from kmixer.data.saved_tokenizers import tokenizer_from_json
from kmixer.data.tokenizers import Tokenizer
from kmixer.errors import InputError
from kmixer.files import (
    TOKENIZER_BYTES,
    is_regular_file,
    read_json_object,
    read_text,
    write_json,
    write_text,
)
from kmixer.interop.folders import check_free, whole_folder
from kmixer.interop.huggingface.card import Facts, write_card
from kmixer.interop.huggingface.tokenizers import library_of, settings_of
from kmixer.interop.huggingface.values import PREFIX, config_values, generation_values, saved_config
from kmixer.models.causal_lm import CausalLM
from kmixer.models.classifiers import ClassifierConfig
from kmixer.models.model_folder import (
    CONFIG,
    MODEL_TYPE,
    TOKENIZER,
    WEIGHTS,
    SavedConfig,
    check_numbers,
    is_huggingface,
    put_weights,
    save_config,
    save_weights,
    tokenizer_digest,
)
from kmixer.models.weight_names import FORMAT, current_names
from kmixer.runs.recipe import LanguageRecipe
from kmixer.runs.run_folder import ENVIRONMENT, METRICS, RECIPE, RESULTS, RunFolder
from kmixer.tensor_files import digest_of, load_plain, read_header, save_plain, save_tensors

GENERATION, TOKENIZER_CONFIG, CARD = "generation_config.json", "tokenizer_config.json", "README.md"
RECORDS, HEADER, INDEX = "kmixer", "weights.json", "model.safetensors.index.json"
NAMES = (CONFIG, GENERATION, WEIGHTS, TOKENIZER, TOKENIZER_CONFIG, CARD, RECORDS)
# Of a run or a model folder, copied as they are.
COPIED = (RECIPE, CONFIG, TOKENIZER, METRICS, ENVIRONMENT, RESULTS)


class Content(NamedTuple):
    """A language model as a folder holds it."""

    config: SavedConfig
    tokenizer: Tokenizer
    tensors: dict[str, Tensor]
    about: dict[str, Any]


def export_folder(
    model: CausalLM, tokenizer: Tokenizer, source: Path, out: Path, *, license: str | None = None, force: bool = False
) -> Path:
    """Write a folder for transformers and its hub, at once or not at all.

    Args:
        model, tokenizer: as loaded from `source`.
        source: the run or model folder.
        out: the folder to make.
        license: a name of the hub's, for the card; None says none.
        force: replace the export that is in `out`.

    Returns:
        The file of weights.

    Raises:
        InputError: a folder that holds something else, or a disk that cannot be written.
    """
    check_free(out, TOKENIZER_CONFIG, NAMES, force=force)
    library = library_of(tokenizer)
    padding = library.id_to_token(tokenizer.vocabulary_size)
    assert padding is not None
    with whole_folder(out) as new:
        write_json(new / CONFIG, config_values(model))
        write_json(new / GENERATION, generation_values(model.vocabulary_size))
        save_plain(new / WEIGHTS, {PREFIX + name: tensor for name, tensor in model.state_dict().items()})
        write_text(new / TOKENIZER, library.to_str(pretty=True))
        write_json(
            new / TOKENIZER_CONFIG,
            {"tokenizer_class": "PreTrainedTokenizerFast", **settings_of(tokenizer, padding)},
        )
        write_text(new / CARD, write_card(_facts(model, source, out.name, license)))
        metadata, sha256 = read_header(source / WEIGHTS)
        if metadata.get("format") == FORMAT:  # of an older layout, the weights are no longer the file's
            (new / RECORDS).mkdir()
            write_json(new / RECORDS / HEADER, {"metadata": metadata, "sha256": sha256})
            for name in COPIED:
                if is_regular_file(source / name):
                    shutil.copyfile(source / name, new / RECORDS / name)
    return out / WEIGHTS


def read_folder(folder: Path) -> Content:
    """The model of a folder that `export_folder` or transformers wrote.

    Raises InputError, one line, where a file is missing or damaged, or does not belong to the others.
    """
    values = read_json_object(folder / CONFIG)
    config = saved_config(values, str(folder / CONFIG))
    if isinstance(config.model, ClassifierConfig) or config.vocabulary_size is None:
        raise InputError(f"{folder} does not hold a language model; restore {CONFIG} from a copy")
    tokenizer = _read_tokenizer(folder, config.vocabulary_size)
    if is_regular_file(folder / INDEX):
        raise InputError(f"{folder / INDEX}: the weights are in several files; save them with a larger max_shard_size")
    tensors = load_plain(folder / WEIGHTS)
    if foreign := sorted(name for name in tensors if not name.startswith(PREFIX)):
        raise InputError(f"{folder / WEIGHTS}: tensor {foreign[0]} is not below {PREFIX}; restore it from a copy")
    check_numbers(tensors, str(folder / WEIGHTS))
    own = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    own = current_names(own, values.get("weights_format", FORMAT), str(folder / WEIGHTS))
    return Content(config, tokenizer, own, _about(folder, config, tokenizer, own))


def import_folder(folder: Path, out: Path, *, force: bool = False) -> str:
    """Make a run folder of a folder that a run was exported to, and a model folder of any other.

    Args:
        folder: as `read_folder` takes it.
        out: the folder to make.
        force: replace the run that is in `out`.

    Returns:
        What was made, in words.

    Raises:
        InputError: as `read_folder` does, or for an `out` that holds something.
    """
    if not is_huggingface(folder):
        raise InputError(f"{folder} is not a Hugging Face folder of kmixer (model_type is not {MODEL_TYPE!r})")
    content = read_folder(folder)
    model = CausalLM(content.config.model, content.config.vocabulary_size)  # type: ignore[arg-type]
    put_weights(model, content.tensors, str(folder / WEIGHTS))
    target, records = RunFolder(out), folder / RECORDS
    target.check_free(force=force)
    with target.held():
        target.check_free(force=force)  # again: another process may have made a run there meanwhile
        run = target.staged()
        if is_regular_file(records / HEADER):
            for name in COPIED:
                if is_regular_file(records / name):
                    shutil.copyfile(records / name, run.path / name)
            save_tensors(run.path / WEIGHTS, content.tensors, read_json_object(records / HEADER)["metadata"])
            run.check_files()
        else:
            save_config(run.path, model, content.tokenizer)
            save_weights(run.path, model, content.tokenizer, content.about)
        whole = run.exists()
        run.publish(target)
    return "run folder" if whole else "model folder"


def _read_tokenizer(folder: Path, vocabulary_size: int) -> Tokenizer:
    """The tokenizer, of which both files must tell the same."""
    settings = read_json_object(folder / TOKENIZER_CONFIG, TOKENIZER_BYTES)
    if "kmixer" not in settings:
        raise InputError(f"{folder / TOKENIZER_CONFIG} has no key kmixer; copy it from the folder that was exported")
    tokenizer = tokenizer_from_json(settings["kmixer"], str(folder / TOKENIZER_CONFIG))
    if tokenizer.vocabulary_size != vocabulary_size:
        raise InputError(
            f"{folder / TOKENIZER_CONFIG} is of another model: it has {tokenizer.vocabulary_size} tokens, and "
            f"the model {vocabulary_size}; copy it from the folder that was exported"
        )
    if vocabulary_of(folder / TOKENIZER) != library_of(tokenizer).get_vocab(with_added_tokens=False):
        raise InputError(
            f"{folder / TOKENIZER} has other tokens than {TOKENIZER_CONFIG}; copy both from the folder that was "
            "exported"
        )
    return tokenizer


def vocabulary_of(path: Path) -> dict[str, int]:
    """The tokens of a file of the tokenizers library. Raises InputError, one line, where it cannot be read."""
    from tokenizers import Tokenizer as Library

    try:
        return dict(Library.from_str(read_text(path, TOKENIZER_BYTES)).get_vocab(with_added_tokens=False))
    except InputError:
        raise
    except Exception as error:  # the library raises nothing narrower
        raise InputError(f"{path} cannot be read; restore it from a copy ({error})") from None


def _about(folder: Path, config: SavedConfig, tokenizer: Tokenizer, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Where the weights come from: what the run said, if they are the run's."""
    path = folder / RECORDS / HEADER
    if not is_regular_file(path):
        return {"imported_from": folder.resolve().name}
    header = read_json_object(path)
    metadata = header.get("metadata")
    if not isinstance(metadata, dict) or not isinstance(metadata.get("about"), dict):
        raise InputError(f"{path} does not say where the weights come from; restore it from a copy")
    if SavedConfig.parse(metadata.get("config"), source=str(path)) != config:
        raise _changed(folder, CONFIG)
    if metadata.get("tokenizer_sha256") != tokenizer_digest(tokenizer.to_json()):
        raise _changed(folder, TOKENIZER_CONFIG)
    if digest_of(tensors, metadata) != header.get("sha256"):
        raise _changed(folder, WEIGHTS)
    about: dict[str, Any] = metadata["about"]
    return about


def _changed(folder: Path, name: str) -> InputError:
    return InputError(
        f"{folder / name} was changed after it was exported; restore it from a copy, or, where it was trained further, "
        f"remove {folder / RECORDS}, which tells of the run before"
    )


def _facts(model: CausalLM, source: Path, name: str, license: str | None) -> Facts:
    run = RunFolder(source)
    facts = Facts(name, sum(parameter.numel() for parameter in model.parameters()), license)
    if not run.exists():
        return facts
    recipe, environment, results = run.read_recipe(), run.environment(), run.results() or {}
    assert isinstance(recipe, LanguageRecipe)
    corpus, best = recipe.data.corpus, results.get("best", {})
    if corpus not in CORPORA:
        corpus = Path(corpus).name  # of one's own text: where it lies is nobody's business
    return facts._replace(
        corpus=corpus,
        corpus_sha256=environment.get("corpus_sha256"),
        description=recipe.description,
        command=environment.get("command"),
        measured=best.get("validation"),
        measured_test=best.get("test"),
    )
