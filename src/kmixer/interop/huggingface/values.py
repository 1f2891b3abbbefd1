"""What config.json and generation_config.json of a Hugging Face folder hold: plain values, without transformers."""

from __future__ import annotations

from typing import Any

from kmixer.errors import InputError, shown
from kmixer.models.causal_lm import CausalLM
from kmixer.models.model_folder import MODEL_TYPE, SavedConfig
from kmixer.models.weight_names import FORMAT
from kmixer.version import VERSION

ARCHITECTURE = "KMixerForCausalLM"
# Before the names of our weights in a file of transformers.
PREFIX = "model."


def config_values(model: CausalLM) -> dict[str, Any]:
    """The content of config.json for a language model."""
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "vocab_size": model.vocabulary_size,
        "kmixer": model.config.model_dump(mode="json"),
        "kmixer_version": VERSION,
        "weights_format": FORMAT,
        "dtype": str(model.embedding.weight.dtype).removeprefix("torch."),
        "tie_word_embeddings": False,
        **standard_values(model.config.model_dump(mode="json"), model.config.max_positions),
    }


def standard_values(model: dict[str, Any], max_positions: int | None) -> dict[str, Any]:
    """Names that tools expect of any configuration; all of them follow from ours."""
    values = {"hidden_size": model["width"], "num_hidden_layers": model["layers"]}
    return values if max_positions is None else {**values, "max_position_embeddings": max_positions}


def generation_values(vocabulary_size: int) -> dict[str, Any]:
    """The content of generation_config.json."""
    return {"pad_token_id": padding_token(vocabulary_size)}


def padding_token(vocabulary_size: int) -> int:
    """The token that fills rows: the first number that is no token of the model."""
    return vocabulary_size


def saved_config(values: dict[str, Any], source: str) -> SavedConfig:
    """Our configuration out of the values of config.json. Raises InputError, one line, where they hold none."""
    if values.get("weights_format", FORMAT) not in range(1, FORMAT + 1):
        raise InputError(
            f"{source}: its weights are of format {shown(values['weights_format'])}, and this version of kmixer reads "
            f"1 to {FORMAT}; install the version that wrote it, or a newer one"
        )
    return SavedConfig.parse(
        {"vocabulary_size": values.get("vocab_size"), "model": values.get("kmixer")}, source=source
    )
