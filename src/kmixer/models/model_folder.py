"""A model on disk: config.json, model.safetensors and, for language, tokenizer.json in one folder."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Discriminator, Tag
from torch import Tensor, nn

from kmixer.config import StrictConfig
from kmixer.data.tokenizers import Tokenizer, tokenizer_from_json
from kmixer.errors import InputError
from kmixer.files import read_json, write_json
from kmixer.models.causal_lm import CausalLM
from kmixer.models.classifiers import Classifier, build_classifier
from kmixer.models.config import ModelConfig, SequenceClassifierConfig, TransformerConfig, kind_of
from kmixer.models.vision import VisionConfig
from kmixer.models.weight_names import FORMAT, current_names
from kmixer.tensor_files import load_tensors, save_tensors

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"


Model = CausalLM | Classifier


class SavedConfig(StrictConfig):
    """What config.json holds."""

    vocabulary_size: int | None = None
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
        metadata["tokenizer_sha256"] = _digest(tokenizer.to_json())
    save_tensors(folder / WEIGHTS, model.state_dict(), metadata)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model folder."""
    return tokenizer_from_json(read_json(folder / TOKENIZER), str(folder / TOKENIZER))


def read_config(folder: Path) -> SavedConfig:
    """The configuration of a model folder."""
    return SavedConfig.parse(read_json(folder / CONFIG), source=str(folder / CONFIG))


def load_weights(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights of a model folder and what is known about them, checked against its other files.

    Weights of an older layout come under the names that they have today.
    """
    config = read_config(folder)
    tensors, metadata = load_tensors(folder / WEIGHTS)
    saved = SavedConfig.parse(metadata.get("config"), source=str(folder / WEIGHTS))
    if saved != config:
        raise InputError(f"{folder / CONFIG} was changed: the weights beside it belong to another configuration")
    tokenizer = _digest(read_json(folder / TOKENIZER)) if config.vocabulary_size is not None else None
    if metadata.get("tokenizer_sha256") != tokenizer:
        raise InputError(f"{folder / TOKENIZER} was changed: the weights beside it belong to another tokenizer")
    return current_names(tensors, metadata.get("format", 1), str(folder / WEIGHTS)), metadata["about"]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def put_weights(model: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Give a model its weights. Raises InputError naming the first tensor that does not fit."""
    expected = model.state_dict()
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors:
            raise InputError(f"{source}: tensor {name} is missing")
        if name not in expected:
            raise InputError(f"{source}: tensor {name} does not belong to this model")
        if tensors[name].shape != expected[name].shape:
            given, needed = tuple(tensors[name].shape), tuple(expected[name].shape)
            raise InputError(f"{source}: tensor {name} has shape {given}; this model needs {needed}")
    trains = {name: p.requires_grad for name, p in model.named_parameters()}
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
