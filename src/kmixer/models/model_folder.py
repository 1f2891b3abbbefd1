"""A model on disk: config.json, model.safetensors and, for language, tokenizer.json in one folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Discriminator, Tag
from torch import Tensor, nn

from kmixer.config import StrictConfig, Vocabulary
from kmixer.data.saved_tokenizers import tokenizer_from_json
from kmixer.data.tokenizers import Tokenizer
from kmixer.errors import InputError, shown_name
from kmixer.files import TOKENIZER_BYTES, read_json, write_json
from kmixer.models.causal_lm import CausalLM, kind_of
from kmixer.models.classifiers import Classifier, build_classifier
from kmixer.models.k_stack import ModelConfig
from kmixer.models.sequence_classifier import SequenceClassifierConfig
from kmixer.models.transformer import TransformerConfig
from kmixer.models.vision import VisionConfig
from kmixer.models.weight_names import FORMAT, current_names
from kmixer.tensor_files import load_tensors, save_tensors

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
# What config.json of a Hugging Face folder calls our architecture, in "model_type".
MODEL_TYPE = "kmixer"
PACKAGED = Path(__file__).parents[1] / "pretrained"

WEIGHT_TYPES = {"torch.float32", "torch.float64", "torch.bfloat16", "torch.float16"}

Model = CausalLM | Classifier


class SavedConfig(StrictConfig):
    """What config.json holds."""

    vocabulary_size: Vocabulary | None = None
    model: Annotated[
        Annotated[ModelConfig, Tag("k-stack")]
        | Annotated[TransformerConfig, Tag("transformer")]
        | Annotated[VisionConfig, Tag("vit")]
        | Annotated[SequenceClassifierConfig, Tag("sequence-classifier")],
        Discriminator(kind_of),
    ]


def describe(model: Model) -> dict[str, Any]:
    """The content of config.json."""
    config = {"model": model.config.model_dump(mode="json")}
    return {"vocabulary_size": model.vocabulary_size, **config} if isinstance(model, CausalLM) else config


def save_config(folder: Path, model: Model, tokenizer: Tokenizer | None) -> None:
    """Write config.json, and tokenizer.json for a language model."""
    write_json(folder / CONFIG, describe(model))
    if tokenizer is not None:
        write_json(folder / TOKENIZER, tokenizer.to_json())


def save_weights(folder: Path, model: Model, tokenizer: Tokenizer | None, about: dict[str, Any]) -> None:
    """Write model.safetensors, bound to its configuration and tokenizer; `about` says where the weights come from."""
    metadata: dict[str, Any] = {"format": FORMAT, "config": describe(model), "about": about}
    if tokenizer is not None:
        metadata["tokenizer_sha256"] = tokenizer_digest(tokenizer.to_json())
    save_tensors(folder / WEIGHTS, model.state_dict(), metadata)


def packaged_models() -> list[str]:
    """Names of the trained models inside the package."""
    return sorted(path.parent.name for path in PACKAGED.glob(f"*/{CONFIG}"))


def find_model_folder(path: str | Path) -> Path:
    """A run folder or a model folder, or that of a packaged model by name. Raises InputError where there is none."""
    folder = Path(path)
    if str(path) in packaged_models() and not folder.exists():
        folder = PACKAGED / str(path)
    if not (folder / CONFIG).is_file():
        names = ", ".join(packaged_models())
        known = f", nor one of the packaged models: {names}" if names else ""
        raise InputError(f"{folder} is not a run or model folder ({CONFIG} is missing){known}")
    return folder


def check_numbers(tensors: dict[str, Tensor], source: str, *, finite: Container[str] = ()) -> None:
    """Raises InputError naming the first tensor that holds a NaN, or, of those named, an infinity.

    A weight that is fixed may be infinite: the logit of a level that is left out.
    """
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            continue
        if not bool(tensor.isfinite().all() if name in finite else not tensor.isnan().any()):
            raise InputError(
                f"{source}: tensor {name} holds numbers that are not finite; the model diverged or the file is "
                "damaged: take other weights"
            )


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model folder."""
    return tokenizer_from_json(read_json(folder / TOKENIZER, TOKENIZER_BYTES), str(folder / TOKENIZER))


def read_config(folder: Path) -> SavedConfig:
    """The configuration of a model folder. Raises InputError, one line, for anything else."""
    if is_huggingface(folder):
        raise InputError(f"{folder} is a Hugging Face folder; kmixer import makes a run or model folder of it")
    return SavedConfig.parse(read_json(folder / CONFIG), source=str(folder / CONFIG))


def is_huggingface(folder: Path) -> bool:
    """Whether a folder holds a model as transformers does; `kmixer.interop.huggingface` reads it."""
    values = read_json(folder / CONFIG)
    return isinstance(values, dict) and values.get("model_type") == MODEL_TYPE


def load_weights(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights of a model folder and what is known about them, checked against its other files.

    Weights of an older layout come under the names that they have today.
    """
    config = read_config(folder)
    tensors, metadata = load_tensors(folder / WEIGHTS)
    saved = SavedConfig.parse(metadata.get("config"), source=str(folder / WEIGHTS))
    if saved != config:
        raise InputError(f"{folder / CONFIG} was changed: the weights beside it belong to another configuration")
    tokenizer = (
        tokenizer_digest(read_json(folder / TOKENIZER, TOKENIZER_BYTES)) if config.vocabulary_size is not None else None
    )
    if metadata.get("tokenizer_sha256") != tokenizer:
        raise InputError(f"{folder / TOKENIZER} was changed: the weights beside it belong to another tokenizer")
    about = metadata.get("about")
    if not isinstance(about, dict):
        raise InputError(f"{folder / WEIGHTS} does not say where its weights come from; restore it from a copy")
    check_numbers(tensors, str(folder / WEIGHTS))
    return current_names(tensors, metadata.get("format", 1), str(folder / WEIGHTS)), about


def tokenizer_digest(value: Any) -> str:
    """What weights hold of the tokenizer beside them, from its description."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def put_weights(model: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Give a model its weights. Raises InputError naming the first tensor that does not fit or is not finite."""
    expected = model.state_dict()
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors:
            raise InputError(f"{source}: tensor {name} is missing")
        if name not in expected:
            raise InputError(f"{source}: tensor {shown_name(name)} does not belong to this model")
        if tensors[name].shape != expected[name].shape:
            given, needed = tuple(tensors[name].shape), tuple(expected[name].shape)
            raise InputError(f"{source}: tensor {name} has shape {given}; this model needs {needed}")
        if tensors[name].is_floating_point() != expected[name].is_floating_point():
            raise InputError(f"{source}: tensor {name} is of {tensors[name].dtype}; {expected[name].dtype} is needed")
    kinds = sorted({str(tensor.dtype) for tensor in tensors.values() if tensor.is_floating_point()})
    if len(kinds) > 1 or not set(kinds) <= WEIGHT_TYPES:
        raise InputError(f"{source}: its tensors are of {', '.join(kinds)}; allowed: one of {', '.join(WEIGHT_TYPES)}")
    trains = {name: p.requires_grad for name, p in model.named_parameters()}
    check_numbers(tensors, source, finite={name for name, trained in trains.items() if trained})
    model.load_state_dict(tensors, assign=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trains[name])


def load_classifier(folder: Path) -> tuple[Classifier, dict[str, Any]]:
    """The classifier of a run or model folder in evaluation mode, and what is known about its weights.

    Raises InputError where the folder holds none, or is damaged.
    """
    config = read_config(folder).model
    if not isinstance(config, VisionConfig | SequenceClassifierConfig):
        raise InputError(f"{folder} holds a language model, not a classifier")
    tensors, about = load_weights(folder)
    with torch.device("meta"):
        model = build_classifier(config)
    put_weights(model, tensors, str(folder / WEIGHTS))
    return model.eval(), about
