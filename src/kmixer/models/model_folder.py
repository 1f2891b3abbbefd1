"""A model on disk: config.json, model.safetensors and tokenizer.json in one folder."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from kmixer.config import StrictConfig
from kmixer.data.tokenizers import Tokenizer, tokenizer_from_json
from kmixer.errors import InputError
from kmixer.files import read_json, write_json
from kmixer.models.causal_lm import CausalLM
from kmixer.models.config import LanguageModelConfig
from kmixer.tensor_files import load_tensors, save_tensors

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"


class SavedConfig(StrictConfig):
    """What config.json holds."""

    vocabulary_size: int
    model: LanguageModelConfig


def describe(model: CausalLM) -> dict[str, Any]:
    """The content of config.json."""
    return {"vocabulary_size": model.vocabulary_size, "model": model.config.model_dump(mode="json")}


def save_config(folder: Path, model: CausalLM, tokenizer: Tokenizer) -> None:
    """Write config.json and tokenizer.json."""
    write_json(folder / CONFIG, describe(model))
    write_json(folder / TOKENIZER, tokenizer.to_json())


def save_weights(folder: Path, model: CausalLM, tokenizer: Tokenizer, about: dict[str, Any]) -> None:
    """Write model.safetensors, bound to its configuration and tokenizer; `about` says where the weights come from."""
    metadata = {"config": describe(model), "tokenizer_sha256": _digest(tokenizer.to_json()), "about": about}
    save_tensors(folder / WEIGHTS, model.state_dict(), metadata)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model folder."""
    return tokenizer_from_json(read_json(folder / TOKENIZER), str(folder / TOKENIZER))


def read_config(folder: Path) -> SavedConfig:
    """The configuration of a model folder."""
    return SavedConfig.parse(read_json(folder / CONFIG), source=str(folder / CONFIG))


def load_weights(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights of a model folder and what is known about them, checked against its other files."""
    config = read_config(folder)
    tensors, metadata = load_tensors(folder / WEIGHTS)
    saved = SavedConfig.parse(metadata.get("config"), source=str(folder / WEIGHTS))
    if saved != config:
        raise InputError(f"{folder / CONFIG} was changed: the weights beside it belong to another configuration")
    if metadata.get("tokenizer_sha256") != _digest(read_json(folder / TOKENIZER)):
        raise InputError(f"{folder / TOKENIZER} was changed: the weights beside it belong to another tokenizer")
    return tensors, metadata["about"]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def put_weights(model: CausalLM, tensors: dict[str, Tensor], source: str) -> None:
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
