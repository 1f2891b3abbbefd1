"""A language model as a class of transformers: forward, generate, from_pretrained.

What is relied on of transformers is little, and in every version since 4.46: the keyword `state` is ours, not its
cache; `prepare_inputs_for_generation` is given all tokens so far, `_update_model_kwargs_for_generation` what came out.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, PreTrainedModel
from transformers.utils import ModelOutput

from kmixer.errors import InputError
from kmixer.generation.decoder import Decoder, open_decoder
from kmixer.interop.huggingface.config import KMixerConfig, config_of
from kmixer.interop.huggingface.read_state import ReadState, after, resumable
from kmixer.interop.huggingface.reading import filled_at_the_left, loss, read
from kmixer.interop.huggingface.values import generation_values, padding_token
from kmixer.models.causal_lm import CausalLM


@dataclass
class KMixerOutput(ModelOutput):  # type: ignore[misc]
    """What a call gives: a loss where labels were given, logits (b, n, v), and where the rows stand afterwards."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    state: ReadState | None = None


class Decoding:
    """One call of `generate`: its decoder, which steps in place, and where its rows stand."""

    def __init__(self) -> None:
        self.latest: ReadState | None = None
        self._decoder: Decoder | None = None
        self._standing: ReadState | None = None

    def step(self, model: CausalLM, tokens: Tensor, state: ReadState) -> tuple[Tensor, ReadState]:
        """Logits (b, 1, v) after one token a row (b, 1), and where the rows stand then."""
        if self._decoder is None:
            self._decoder = open_decoder(model, state.state)
        elif self._standing is not state:
            self._decoder.restore(state.state)
        logits = self._decoder.step(tokens[:, 0])[:, None].clone()
        self._standing = ReadState(self._decoder.state(), after(tokens, [0] * len(tokens), state.read))
        return logits, self._standing


class WithFilling(LogitsProcessorList):  # type: ignore[misc]
    """What changes scores, which may look up those of any token in a row: the one that fills it up has one too."""

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        if not self:
            return scores
        wider = F.pad(scores, (0, 1), value=-torch.inf)
        return cast(Tensor, super().__call__(input_ids, wider, **kwargs))[:, :-1]


# Of this thread: several may generate with one model.
_DECODING: ContextVar[Decoding | None] = ContextVar("decoding", default=None)


class KMixerForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A language model of kmixer, as transformers calls it.

    `state` of an output goes in as `state` of the next call, with the tokens that follow. In `generate` the tokens that
    are given are always all of the text; a state of their beginning saves reading it again.
    """

    config_class = KMixerConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _is_stateful = True  # there is no going back by cutting a cache short
    _no_split_modules = ["CausalLM"]  # noqa: RUF012

    def __init__(self, config: KMixerConfig) -> None:
        super().__init__(config)
        saved = config.saved()
        assert saved.vocabulary_size is not None
        self.model = CausalLM(cast(Any, saved.model), saved.vocabulary_size)
        self.generation_config = GenerationConfig(**generation_values(saved.vocabulary_size))
        # Parameters that a model holds and does not use; transformers makes all of what it loads trainable.
        self._fixed = [name for name, parameter in self.named_parameters() if not parameter.requires_grad]
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *arguments: Any, **options: Any) -> Any:
        """As transformers has it, but every tensor must be there: one that is missing would stay as memory was.

        Raises InputError for tensors that are missing or that the model has not.
        """
        wanted = options.pop("output_loading_info", False)
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *arguments, output_loading_info=True, **options
        )
        for problem in ("missing", "unexpected", "mismatched"):
            if names := sorted(map(str, info.get(f"{problem}_keys") or ())):
                raise InputError(
                    f"{pretrained_model_name_or_path}: {problem} tensors: {', '.join(names[:5])}"
                    f"{', ...' if len(names) > 5 else ''}; restore model.safetensors from a copy"
                )
        for name in model._fixed:
            model.get_parameter(name).requires_grad_(False)
        return (model, info) if wanted else model

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        state: ReadState | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        num_items_in_batch: Tensor | int | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> KMixerOutput | tuple[Any, ...]:
        """Logits of the next token at every position, and the state after the last; or the loss of the labels.

        Args:
            input_ids: (b, n), the tokens that follow those of `state`.
            attention_mask: (b, n) or longer, 0 where a row is filled up at its beginning; without a state only.
            state: of an output; None is the beginning.
            labels: (b, n), usually the tokens themselves; they are shifted here, and -100 does not count. While
                training there are no logits then: a loss is made of them piece by piece.
            logits_to_keep: of how many positions, from the end; 0 is all.
            num_items_in_batch: what the summed loss is divided by, in the place of the number of labels.
            use_cache: whether there is a state in the output; None is where there are no labels.

        Raises InputError for any other mask, and for tokens outside the vocabulary but for the one that fills rows up.
        """
        if kwargs.get("inputs_embeds") is not None:
            raise InputError("inputs_embeds: got some; allowed: input_ids, the numbers that a tokenizer gives")
        filling = padding_token(self.model.vocabulary_size)
        filled = filled_at_the_left(attention_mask, input_ids, filling if state is None else None)
        if state is not None and any(filled):
            raise InputError("attention_mask: got rows that are filled up after a state; allowed: at the beginning")
        # Rows that have ended are filled up too, at their end: nothing that is read there is used.
        tokens = input_ids.masked_fill(input_ids == filling, filling - 1)
        total, logits, stand = None, None, None
        if labels is not None:
            total = loss(self.model, tokens, filled, labels, num_items_in_batch)
        if labels is None or not self.training:
            logits, stand = self._read(tokens, input_ids, filled, state, int(logits_to_keep))
        wanted = labels is None if use_cache is None else use_cache
        output = KMixerOutput(loss=total, logits=logits, state=stand if wanted else None)
        return output if return_dict in (None, True) else output.to_tuple()

    def _read(
        self, tokens: Tensor, input_ids: Tensor, filled: list[int], state: ReadState | None, last: int
    ) -> tuple[Tensor, ReadState]:
        decoding = _DECODING.get()
        if decoding is not None and state is not None and tokens.shape[1] == 1:
            return decoding.step(self.model, tokens, state)
        logits, stand = read(self.model, tokens, filled, None if state is None else state.state, last)
        return logits, ReadState(stand, after(input_ids, filled, None if state is None else state.read))

    @torch.no_grad()
    def generate(self, *arguments: Any, **options: Any) -> Any:
        """As transformers has it; with `return_dict_in_generate` the answer also has `state`.

        `generate(answer.sequences, state=answer.state, ...)` goes on from there.
        """
        decoding = Decoding()
        outer = _DECODING.set(decoding)
        try:
            answer = super().generate(*arguments, **options)
        finally:
            _DECODING.reset(outer)
        if isinstance(answer, ModelOutput):
            answer["state"] = decoding.latest
        return answer

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """What `forward` is called with: the tokens that the state has not read."""
        mask, state = kwargs.get("attention_mask"), kwargs.get("state")
        inputs = {"input_ids": input_ids, "attention_mask": mask, "use_cache": kwargs.get("use_cache", True)}
        if "logits_to_keep" in kwargs:
            inputs["logits_to_keep"] = kwargs["logits_to_keep"]
        if state is not None and inputs["use_cache"]:
            filling = padding_token(self.model.vocabulary_size)
            known = resumable(state, input_ids, filled_at_the_left(mask, input_ids, filling))
            if known is not None:
                inputs["state"], columns = known
                inputs["input_ids"], inputs["attention_mask"] = input_ids[:, columns:], None
        return inputs

    def _update_model_kwargs_for_generation(
        self, outputs: KMixerOutput, model_kwargs: dict[str, Any], *arguments: Any, **options: Any
    ) -> dict[str, Any]:
        values: dict[str, Any] = super()._update_model_kwargs_for_generation(
            outputs, model_kwargs, *arguments, **options
        )
        values.pop("state", None)
        if outputs.state is not None:
            values["state"] = outputs.state
        if (decoding := _DECODING.get()) is not None:
            decoding.latest = outputs.state
        return values

    def _get_logits_processor(self, *arguments: Any, **options: Any) -> LogitsProcessorList:
        return WithFilling(super()._get_logits_processor(*arguments, **options))

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # an empty cache would be built, and ignored

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: modules are made with their weights."""

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embedding = cast(Any, value)

    def resize_token_embeddings(self, *arguments: Any, **options: Any) -> nn.Module:
        """Nothing to do for the token that fills rows; a vocabulary does not grow.

        Raises InputError where that is asked for.
        """
        raise InputError(
            f"resize_token_embeddings: a vocabulary does not grow; leave the call out: token "
            f"{padding_token(self.model.vocabulary_size)} of the tokenizer fills rows up and needs no embedding"
        )

    def get_output_embeddings(self) -> None:
        """None: heads differ, and none is a matrix to be tied or grown."""


def to_huggingface(model: CausalLM) -> KMixerForCausalLM:
    """The model as a class of transformers; both are the same weights."""
    with torch.device("meta"):
        whole = KMixerForCausalLM(config_of(model))
    whole.model = model
    return whole.train(model.training)  # type: ignore[no-any-return]
