"""The configuration of a language model as a class of transformers."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from kmixer.interop.huggingface.values import config_values, saved_config, standard_values
from kmixer.models.causal_lm import CausalLM
from kmixer.models.model_folder import MODEL_TYPE, SavedConfig


class KMixerConfig(PretrainedConfig):  # type: ignore[misc]
    """A model's configuration: `kmixer` is ours, as a run's config.json has it under "model"; the rest follows from it.

    Args:
        kmixer: None is a configuration of nothing, which transformers asks for to know the defaults.
        vocab_size: v, without the token that fills rows.
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference = ["state"]  # noqa: RUF012  (an annotation would make it a field)

    def __init__(self, kmixer: dict[str, Any] | None = None, vocab_size: int | None = None, **values: Any) -> None:
        super().__init__(**{"tie_word_embeddings": False, **values})
        self.kmixer, self.vocab_size = kmixer, vocab_size
        if kmixer is not None:
            ours = self.saved()
            self.kmixer = ours.model.model_dump(mode="json")
            for name, value in standard_values(self.kmixer, getattr(ours.model, "max_positions", None)).items():
                setattr(self, name, value)

    def saved(self) -> SavedConfig:
        """Ours, checked. Raises InputError, one line, where it is wrong."""
        values = {"kmixer": self.kmixer, "vocab_size": self.vocab_size}
        if hasattr(self, "weights_format"):
            values["weights_format"] = self.weights_format
        return saved_config(values, "config.json")


def config_of(model: CausalLM) -> KMixerConfig:
    """The configuration of a language model."""
    return KMixerConfig(**config_values(model))
