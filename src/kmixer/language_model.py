"""The model as a user meets it: load, call, stream, generate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

import torch
from torch import Tensor

from kmixer.data.tokenizers import Tokenizer
from kmixer.errors import InputError
from kmixer.generation.named_drafts import AnyDraft
from kmixer.generation.prepared import can_prepare
from kmixer.generation.sampling import Sampling
from kmixer.generation.speculation import Speculation
from kmixer.generation.speculative import generate_drafted
from kmixer.generation.streaming import encode_prompt, generate_tokens, text_of
from kmixer.interop.huggingface.folder import read_folder
from kmixer.measure.evaluating import evaluating
from kmixer.models.causal_lm import CausalLM, DecodedIn, LanguageModelConfig
from kmixer.models.classifiers import ClassifierConfig
from kmixer.models.model_folder import (
    WEIGHTS,
    find_model_folder,
    is_huggingface,
    load_tokenizer,
    load_weights,
    put_weights,
    read_config,
)
from kmixer.runs.run_folder import RunFolder

Item = TypeVar("Item")


class LanguageModel(CausalLM):
    """A causal language model with its tokenizer.

    `model(tokens, state)` returns an `Output` with logits (b, t, v) and the state after the last
    token; see `CausalLM`. `tokenizer` is None for a model made from a recipe without data.
    """

    def __init__(self, config: LanguageModelConfig, vocabulary_size: int, tokenizer: Tokenizer | None = None) -> None:
        super().__init__(config, vocabulary_size)
        self.tokenizer = tokenizer
        self.about: dict[str, Any] = {}  # where loaded weights come from: recipe, step, losses, corpus
        self.folder: Path | None = None  # that they were loaded from

    @classmethod
    def from_recipe(cls, recipe: str, settings: list[str] | None = None) -> LanguageModel:
        """Fresh weights for a recipe (a packaged name or a TOML file), its vocabulary size taken from it."""
        from kmixer.runs.recipe import load_language_recipe

        loaded = load_language_recipe(recipe, settings)
        return cls(loaded.model, loaded.tokenizer.vocabulary_size)

    @overload
    def generate(
        self,
        prompt: str,
        max_new_tokens: int = ...,
        temperature: float = ...,
        top_k: int | None = ...,
        top_p: float | None = ...,
        seed: int | None = ...,
        stop: Sequence[str] = ...,
        stream: Literal[False] = ...,
        *,
        draft: AnyDraft | None = ...,
        speculation: Speculation | None = ...,
    ) -> str: ...
    @overload
    def generate(
        self,
        prompt: str,
        max_new_tokens: int = ...,
        temperature: float = ...,
        top_k: int | None = ...,
        top_p: float | None = ...,
        seed: int | None = ...,
        stop: Sequence[str] = ...,
        *,
        stream: Literal[True],
        draft: AnyDraft | None = ...,
        speculation: Speculation | None = ...,
    ) -> Iterator[str]: ...
    @overload
    def generate(
        self,
        prompt: Tensor,
        max_new_tokens: int = ...,
        temperature: float = ...,
        top_k: int | None = ...,
        top_p: float | None = ...,
        seed: int | None = ...,
        stop: Sequence[str] = ...,
        stream: Literal[False] = ...,
        *,
        draft: AnyDraft | None = ...,
        speculation: Speculation | None = ...,
    ) -> Tensor: ...
    @overload
    def generate(
        self,
        prompt: Tensor,
        max_new_tokens: int = ...,
        temperature: float = ...,
        top_k: int | None = ...,
        top_p: float | None = ...,
        seed: int | None = ...,
        stop: Sequence[str] = ...,
        *,
        stream: Literal[True],
        draft: AnyDraft | None = ...,
        speculation: Speculation | None = ...,
    ) -> Iterator[Tensor]: ...
    def generate(
        self,
        prompt: str | Tensor,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: Sequence[str] = (),
        stream: bool = False,
        *,
        draft: AnyDraft | None = None,
        speculation: Speculation | None = None,
    ) -> str | Tensor | Iterator[str] | Iterator[Tensor]:
        """Continue a prompt with dropout off.

        Args:
            prompt: a text, or tokens (b, t) int64.
            max_new_tokens: tokens to add.
            temperature, top_k, top_p: see `Sampling`.
            seed: makes the result repeatable.
            stop: texts before which generation ends; for a text prompt.
            stream: return an iterator over new text (or new tokens (b,)) instead of the whole.
            draft: what proposes tokens that this model verifies, several in one pass: a smaller model with the same
                tokens, "ngram:5", "lookup" or other names, see `kmixer.generation.named_drafts`.
            speculation: how they are verified; by default so that the text is that of the same seed without draft.

        Returns:
            Prompt and continuation: a text for a text, tokens (b, t + new) for tokens.

        Raises:
            InputError: a prompt the tokenizer does not know, settings out of range, or a draft that does not fit.
        """
        sampling = Sampling(temperature, top_k, top_p)
        if speculation is not None and draft is None:
            raise InputError("speculation: got settings without a draft; give draft too, for example 'ngram:5'")

        def columns(tokens: Tensor) -> Iterator[Tensor]:
            if draft is None:
                return generate_tokens(self, tokens, max_new_tokens, sampling, seed=seed)
            return generate_drafted(self, draft, tokens, max_new_tokens, speculation, sampling, seed=seed)

        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise InputError("this model has no tokenizer: give the prompt as tokens (b, t)")
            tokens = encode_prompt(self, self.tokenizer, prompt)
            pieces = self._evaluating(text_of(tokens, columns(tokens), self.tokenizer, stop))
            return pieces if stream else prompt + "".join(pieces)
        if stop:
            raise InputError("stop texts go with a text prompt, not with tokens")
        new = self._evaluating(columns(prompt))
        return new if stream else torch.cat([prompt, *(column[:, None] for column in new)], dim=1)

    def _evaluating(self, items: Iterator[Item]) -> Iterator[Item]:
        """The same items, made with dropout off; the mode is afterwards what it was."""
        with evaluating(self):
            yield from items


def load(path: str | Path, *, memory: int | None = None, weights: DecodedIn = "float32") -> LanguageModel:
    """Load a run folder, a model folder or a packaged model: weights, configuration, tokenizer, in evaluation mode.

    A folder of `kmixer export --format huggingface`, or that transformers has written, is taken as a model folder.

    Args:
        path: the folder, or the name of a packaged model.
        memory: how many tokens its copy memory remembers, an even number; None is as it was trained.
        weights: of the matrices of decoding steps: in 16 or 8 bits they are rounded, and a step reads less.

    Raises InputError, one line, where the folder is not a model or is damaged, for a memory that does not fit it, and
    for rounded weights of a model that has no prepared step.
    """
    RunFolder(Path(path)).settle()
    folder = find_model_folder(path)
    foreign = read_folder(folder) if is_huggingface(folder) else None
    config = read_config(folder) if foreign is None else foreign.config
    if isinstance(config.model, ClassifierConfig) or config.vocabulary_size is None:
        raise InputError(f"{folder} holds a classifier, not a language model; kmixer eval measures it")
    settings = config.model if memory is None else config.model.with_memory(memory)
    tokenizer = load_tokenizer(folder) if foreign is None else foreign.tokenizer
    tensors, about = load_weights(folder) if foreign is None else (foreign.tensors, foreign.about)
    with torch.device("meta"):
        model = LanguageModel(settings, config.vocabulary_size, tokenizer)
    put_weights(model, tensors, str(folder / WEIGHTS))
    RunFolder(folder).check_files()
    model.about, model.folder, model.decoded_in = about, folder, weights
    can_prepare(model.eval())
    return model
