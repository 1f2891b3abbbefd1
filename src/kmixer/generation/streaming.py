"""Generating token by token from a state: constant memory where the model streams."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import cast

import torch
from jaxtyping import Int
from torch import Tensor

from kmixer.data.tokenizers import Tokenizer
from kmixer.errors import InputError
from kmixer.generation.prepared import DecodingStep, can_prepare
from kmixer.generation.sampling import Sampling
from kmixer.models.causal_lm import CausalLM
from kmixer.models.k_stack import KStackState
from kmixer.state import State

# A prompt is read in pieces, so that its length does not set the memory.
PREFILL_CHUNK = 2048


@torch.inference_mode()
def generate_tokens(
    model: CausalLM,
    prompt: Int[Tensor, "b t"],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    *,
    seed: int | None = None,
    state: State | None = None,
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
    if prompt.ndim != 2 or prompt.shape[1] == 0:
        raise InputError(f"prompt: got shape {tuple(prompt.shape)}; allowed: (batch, time) with one token or more")
    if prompt.min() < 0 or prompt.max() >= model.vocabulary_size:
        raise InputError(f"prompt: token outside 0..{model.vocabulary_size - 1}")
    if max_new_tokens < 0:
        raise InputError(f"max_new_tokens: got {max_new_tokens}; allowed: 0 or more")
    if seed is not None and not 0 <= seed < 1 << 63:
        raise InputError(f"seed: got {seed}; allowed: 0 to 2^63 - 1")
    limit = model.config.max_positions
    if limit is not None and state is None and prompt.shape[1] + max_new_tokens > limit:
        raise InputError(
            f"prompt and new tokens are {prompt.shape[1] + max_new_tokens} positions; "
            f"{model.config.limited_by} ends at {limit}: ask for {max(0, limit - prompt.shape[1])} "
            "or fewer new tokens, or use a model with a toeplitz or conv base kernel, which stream"
        )
    sampling = sampling or Sampling()
    generator = torch.Generator(prompt.device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    state = state if state is not None else model.initial_state(prompt.shape[0])
    logits: Tensor | None = None
    for piece in prompt.split(PREFILL_CHUNK, dim=1):
        output = model(piece, state)
        assert output.logits is not None
        logits, state = output.logits[:, -1], output.state
    step = _next_step(model, state)
    for index in range(max_new_tokens):
        assert logits is not None
        tokens = sampling(logits, generator)
        yield tokens
        if index + 1 < max_new_tokens:
            logits = step(tokens)


def _next_step(model: CausalLM, state: State) -> Callable[[Tensor], Tensor]:
    """A function from tokens (b,) to the logits (b, v) of the next: prepared where that is possible."""
    if can_prepare(model):
        return DecodingStep(model, cast("KStackState", state))

    def step(tokens: Tensor) -> Tensor:
        nonlocal state
        output = model(tokens[:, None], state)
        state = output.state
        assert output.logits is not None
        return output.logits[:, -1]

    return step


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
    if not prompt:
        raise InputError('prompt: got ""; give one character or more')
    unknown = tokenizer.unknown(prompt)
    if unknown:
        raise InputError(f"prompt: the tokenizer does not know {', '.join(map(repr, unknown))}")
    tokens = torch.from_numpy(tokenizer.encode(prompt)).to(model.embedding.weight.device)[None]
    if tokens.numel() == 0:
        raise InputError(f"prompt: got {prompt!r}, in which this tokenizer sees no token; give a word or more")
    decode = tokenizer.decoder()
    pieces = (decode(int(token)) for token in generate_tokens(model, tokens, max_new_tokens, sampling, seed=seed))
    return until(pieces, [text for text in stop if text])


def until(pieces: Iterator[str], stop: Sequence[str]) -> Iterator[str]:
    """The text of the pieces up to the first stop string; holds back only what may be the start of one."""
    held = ""
    for piece in pieces:
        held += piece
        ends = [held.index(text) for text in stop if text in held]
        if ends:
            held = held[: min(ends)]
            break
        length = _possible_start(held, stop)
        ready, held = held[: len(held) - length], held[len(held) - length :]
        if ready:
            yield ready
    if held:
        yield held


def _possible_start(text: str, stop: Sequence[str]) -> int:
    """Length of the longest end of the text that begins a stop string."""
    longest = max((len(word) for word in stop), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(word.startswith(text[-length:]) for word in stop):
            return length
    return 0
