"""kmixer's language models for transformers: importing this module makes its Auto classes know them.

>>> import kmixer.huggingface
>>> from transformers import AutoConfig
>>> AutoConfig.for_model("kmixer").model_type
'kmixer'
"""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM

from kmixer.interop.huggingface.config import KMixerConfig
from kmixer.interop.huggingface.model import KMixerForCausalLM, to_huggingface
from kmixer.interop.huggingface.tokenizers import tokenizer_for
from kmixer.language_model import LanguageModel, load

__all__ = ["KMixerConfig", "KMixerForCausalLM", "from_huggingface", "to_huggingface", "tokenizer_for"]

AutoConfig.register(KMixerConfig.model_type, KMixerConfig, exist_ok=True)
AutoModelForCausalLM.register(KMixerConfig, KMixerForCausalLM, exist_ok=True)


def from_huggingface(folder: str | Path) -> LanguageModel:
    """The language model of a folder that transformers wrote, or `kmixer export --format huggingface`.

    Raises InputError, one line, where it holds none or is damaged.
    """
    return load(folder)
