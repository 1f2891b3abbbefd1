"""Generating token by token from a state: constant memory where the model streams."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from kmixer.data.tokenizers import Tokenizer
from kmixer.errors import InputError
from kmixer.generation.decoder import Decoder, EagerDecoder
from kmixer.generation.prepared import PreparedDecoder, can_prepare
from kmixer.generation.reading import PREFILL_CHUNK, PromptReader
from kmixer.generation.sampling import Sampling
from kmixer.models.causal_lm import CausalLM, check_tokens
from kmixer.state import State


def generate_tokens(
    model: CausalLM,
    prompt: Int[Tensor, "b t"],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    *,
    seed: int | None = None,
    state: State = None,
) -> Iterator[Int[Tensor, " b"]]:
    """The next tokens of every row, one position at a time.

    Args:
        model: in evaluation mode.
        prompt: one token or more a row.
        max_new_tokens: positions to generate.
        sampling: plain sampling at temperature 1 when None.
        seed: of the drawing; None draws a fresh one.
        state: where the prompt continues from; the start of a sequence when None.

    Raises:
        InputError: an empty prompt, tokens outside the vocabulary, or a model whose base kernel
            ends before the last token.
    """
    check_request(model, prompt, max_new_tokens, begins=state is None)
    sampling = sampling or Sampling()
    generator = seeded_generator(prompt.device, seed)
    with torch.inference_mode():
        logits, decoder = _read(model, prompt, model.initial_state(len(prompt)) if state is None else state)
    step = step_of(decoder)
    for index in range(max_new_tokens):
        tokens = sampling(logits, generator)
        yield tokens
        if index + 1 < max_new_tokens:
            logits = step(tokens)


def step_of(decoder: Decoder) -> Callable[[Tensor], Tensor]:
    """The step of a decoder, without gradients."""
    # A prepared step is no work of torch's: for one row, to say so at every token would take a tenth of it.
    return decoder.step if isinstance(decoder, PreparedDecoder) else torch.inference_mode()(decoder.step)


def check_request(model: CausalLM, prompt: Tensor, max_new_tokens: int, *, begins: bool = True) -> None:
    """Raises InputError where a prompt cannot be continued so far; it begins the sequence, or goes on from a state."""
    if prompt.ndim != 2 or prompt.shape[1] == 0:
        raise InputError(f"prompt: got shape {tuple(prompt.shape)}; allowed: (batch, time) with one token or more")
    check_tokens(prompt, model.vocabulary_size)
    if max_new_tokens < 0:
        raise InputError(f"max_new_tokens: got {max_new_tokens}; allowed: 0 or more")
    limit = model.config.max_positions
    if limit is not None and begins and prompt.shape[1] + max_new_tokens > limit:
        raise InputError(
            f"prompt and new tokens are {prompt.shape[1] + max_new_tokens} positions; "
            f"{model.config.limited_by} ends at {limit}: ask for {max(0, limit - prompt.shape[1])} "
            "or fewer new tokens, or use a model with a toeplitz or conv base kernel, which stream"
        )


def seeded_generator(device: torch.device, seed: int | None) -> torch.Generator:
    """What tokens are drawn with; None draws a fresh seed. Raises InputError for one out of range."""
    if seed is not None and not 0 <= seed < 1 << 63:
        raise InputError(f"seed: got {seed}; allowed: 0 to 2^63 - 1")
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


def _read(model: CausalLM, prompt: Tensor, state: State) -> tuple[Tensor, Decoder]:
    """Logits (b, v) after a prompt, and a decoder that stands there."""
    reader = PromptReader(model, state, prepared=can_prepare(model))
    position, logits = 0, None
    while position < prompt.shape[1]:
        n = reader.length(position, prompt.shape[1] - position)
        logits = reader.read(prompt[:, position : position + n])
        position += n
    assert logits is not None
    return logits[:, -1], reader.decoder


def before_last(model: CausalLM, prompt: Int[Tensor, "b t"]) -> State:
    """The state after all of a prompt but its last token, which a round of speculative decoding begins with."""
    decoder = EagerDecoder(model, model.initial_state(len(prompt)))
    if prompt.shape[1] > 1:
        for piece in prompt[:, :-1].split(PREFILL_CHUNK, dim=1):
            decoder.advance(piece)
    return decoder.state()


def generate_text(
    model: CausalLM,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    *,
    seed: int | None = None,
    stop: Sequence[str] = (),
) -> Iterator[str]:
    """The continuation of a prompt, in pieces as they become known; ends before the first stop string.

    Raises InputError for an empty prompt, or one with characters the tokenizer does not know.
    """
    tokens = encode_prompt(model, tokenizer, prompt)
    new = generate_tokens(model, tokens, max_new_tokens, sampling, seed=seed)
    return text_of(tokens, new, tokenizer, stop)


def encode_prompt(model: CausalLM, tokenizer: Tokenizer, prompt: str) -> Int[Tensor, "1 t"]:
    """The tokens of a prompt, where the model is. Raises InputError as `generate_text` does."""
    if not prompt:
        raise InputError('prompt: got ""; give one character or more')
    unknown = tokenizer.unknown(prompt)
    if unknown:
        raise InputError(f"prompt: the tokenizer does not know {', '.join(map(repr, unknown))}")
    tokens = torch.from_numpy(tokenizer.encode(prompt)).to(model.embedding.weight.device)[None]
    if tokens.numel() == 0:
        raise InputError(f"prompt: got {prompt!r}, in which this tokenizer sees no token; give a word or more")
    return tokens


def text_of(
    prompt: Int[Tensor, "1 t"], columns: Iterator[Tensor], tokenizer: Tokenizer, stop: Sequence[str] = ()
) -> Iterator[str]:
    """The text of new tokens (1,), in pieces, as what follows the prompt, up to the first stop string."""
    return until(decoded_after(prompt, columns, tokenizer), [text for text in stop if text])


def decoded_after(prompt: Int[Tensor, "1 t"], columns: Iterator[Tensor], tokenizer: Tokenizer) -> Iterator[str]:
    """The text of new tokens (1,), in pieces, as what follows the prompt; what they leave open comes last."""
    decoder = tokenizer.decoder()
    for token in prompt[0].tolist():
        decoder(token)
    for column in columns:
        yield decoder(int(column))
    yield decoder.end()


def until(pieces: Iterator[str], stop: Sequence[str]) -> Iterator[str]:
    """The text before the first place where a stop string begins, whatever the pieces it comes in.

    What may be the start of a stop string is held back. One that is complete ends the text once no other that begins
    before it can become complete.
    """
    text = StoppedText(stop)
    for piece in pieces:
        if ready := text(piece):
            yield ready
        if text.stopped:
            return
    if rest := text.end():
        yield rest


class StoppedText:
    """`until` for text that is given piece by piece: a call returns what is known to stand before any stop string."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop, self._held = stop, ""
        self.stopped = False

    def __call__(self, piece: str) -> str:
        if not self._stop:
            return piece
        held = self._held + piece
        begun = len(held) - _possible_start(held, self._stop)
        end = self._first(held)
        self.stopped = end < len(held) and end <= begun
        if self.stopped:
            self._held = ""
            return held[:end]
        ready = min(begun, end)
        self._held = held[ready:]
        return held[:ready]

    def end(self) -> str:
        """What is left when nothing follows."""
        held, self._held = self._held, ""
        end = self._first(held)
        self.stopped = self.stopped or end < len(held)
        return held[:end]

    def _first(self, held: str) -> int:
        """Where the first stop string begins; the length where there is none."""
        return min((held.index(text) for text in self._stop if text in held), default=len(held))


def _possible_start(text: str, stop: Sequence[str]) -> int:
    """Length of the longest end of the text that begins a stop string."""
    longest = max((len(word) for word in stop), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(word.startswith(text[-length:]) for word in stop):
            return length
    return 0
