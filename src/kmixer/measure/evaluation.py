"""Evaluation: cross-entropy on held-out text, by windows or as one stream."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from kmixer.data.batches import consecutive_windows
from kmixer.data.token_cache import TokenSplit
from kmixer.errors import InputError
from kmixer.layers.adapting import check_stream
from kmixer.measure.evaluating import evaluating
from kmixer.models.causal_lm import CausalLM
from kmixer.runs.recipe import Protocol
from kmixer.state import State

# Tokens of one forward pass: enough to keep the matrix products busy, little enough for any memory.
TOKENS_PER_BATCH = 16384
STREAM_CHUNK = 4096
# Is told how many tokens of a stream were read, and the state after them.
Seen = Callable[[int, State], None]
# Gives the losses (1, t) of a stream of tokens, in pieces.
Reader = Callable[[CausalLM, Tensor], Iterator[Tensor]]
LARGEST_EXPONENT = 700.0  # whose exponential is a float64


@dataclass(frozen=True)
class Evaluation:
    """A measured loss, with what is needed to compare it."""

    protocol: Protocol
    window: int | None  # None: a stream, state carried
    tokens: int  # scored
    loss: float  # mean cross-entropy, nats per token
    # exp(loss), and exp(loss times tokens per word), where a number holds them; words stand between white space.
    perplexity: float | None
    perplexity_per_word: float | None
    bits_per_character: float | None  # None of raw bytes
    bits_per_byte: float
    stretches: list[float] | None  # mean loss of the positions 1, 2, 3-4, 5-8, ... of a window; None of a stream
    tenths: list[float] | None = None  # mean loss of every tenth of a stream of ten tokens or more; None of windows

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def summary(self) -> str:
        return f"({self.protocol}) {self.loss:.4f} nats, {self.bits_per_byte:.4f} bits/byte"


@torch.no_grad()
def evaluate(
    model: CausalLM,
    split: TokenSplit,
    protocol: Protocol,
    window: int,
    seen: Seen | None = None,
    reader: Reader | None = None,
) -> Evaluation:
    """Mean cross-entropy of a model, in its own precision and with dropout off.

    "windows": windows of `window` tokens that do not overlap, state reset at each, every position
    counted, tail dropped. "stream": all tokens in one sequence, state carried.
    Bits per character and per byte, and perplexity per word, use the counts of the whole split. `seen` is told of a
    stream how many tokens were read, and the state after them, every STREAM_CHUNK tokens, where the model reads it
    itself and not a `reader`.

    Raises:
        InputError: text shorter than a window, or a stream asked of a model that has none.
    """
    windows = protocol == "windows"
    if windows:
        losses = _window_losses(model, split.tokens, window)
    else:
        losses = reader(model, split.tokens) if reader else stream_losses(model, split.tokens, seen=seen)
    tenths = torch.zeros(10, dtype=torch.float64)
    with evaluating(model):
        sums: Tensor | float = 0.0  # by position, of windows
        count = 0
        for block in losses:
            sums = sums + (block.double().sum(0) if windows else block.double().sum())
            if not windows:
                tenth = 10 * torch.arange(count, count + block.numel()) // (len(split.tokens) - 1)
                tenths += torch.bincount(tenth, block.double().flatten().cpu(), 10)
            count += block.numel()
    assert isinstance(sums, Tensor)
    loss = float(sums.sum()) / count
    bits = loss / math.log(2)
    per_character = split.tokens_per_character
    return Evaluation(
        protocol=protocol,
        window=window if windows else None,
        tokens=count,
        loss=loss,
        perplexity=_exponential(loss),
        perplexity_per_word=_exponential(loss * split.tokens_per_word),
        bits_per_character=None if per_character is None else bits * per_character,
        bits_per_byte=bits * split.tokens_per_byte,
        stretches=stretches_of(sums * window / count) if windows else None,
        tenths=None if windows or count < 10 else (tenths / _sizes_of_tenths(count)).tolist(),
    )


def _sizes_of_tenths(count: int) -> Tensor:
    return torch.bincount(10 * torch.arange(count) // count, minlength=10)


def _exponential(nats: float) -> float | None:
    return math.exp(nats) if nats < LARGEST_EXPONENT else None


def stretches_of(losses: Tensor) -> list[float]:
    """Means over stretches that double in length: the losses of the positions 1, 2, 3-4, 5-8, ..."""
    return [float(losses[a:b].mean()) for a, b in itertools.pairwise(stretch_edges(len(losses)))]


def stretch_edges(count: int) -> list[int]:
    """Where stretches of so many positions begin, and the last ends: 0, 1, 2, 4, 8, ..., count."""
    return [0, *(1 << i for i in range((count - 1).bit_length())), count]


@torch.no_grad()
def loss_by_position(model: CausalLM, split: TokenSplit, window: int) -> list[float]:
    """Mean cross-entropy in nats at each position of windows that do not overlap."""
    with evaluating(model):
        blocks = list(_window_losses(model, split.tokens, window))
    return torch.cat(blocks).double().mean(0).tolist()


def _window_losses(model: CausalLM, tokens: Tensor, window: int) -> Iterator[Tensor]:
    limit = model.config.max_positions
    if limit is not None and window > limit:
        raise InputError(f"window {window}: {model.config.limited_by} ends at position {limit}")
    if len(tokens) <= window:
        raise InputError(f"the text has {len(tokens)} tokens; a window of {window} needs {window + 1} or more")
    device = model.embedding.weight.device
    for x, y in consecutive_windows(tokens, window, max(1, TOKENS_PER_BATCH // window)):
        yield _losses(model, x.to(device), y.to(device), None)[0]


def stream_losses(
    model: CausalLM, tokens: Tensor, chunk: int = STREAM_CHUNK, seen: Seen | None = None
) -> Iterator[Tensor]:
    """Losses (1, t) of one sequence in constant memory, a chunk at a time; `seen` as for `evaluate`.

    Raises InputError for a model that cannot read without end, and for fewer than 2 tokens.
    """
    check_stream(model)
    return sequence_losses(model, tokens, chunk, seen)


def sequence_losses(
    model: CausalLM, tokens: Tensor, chunk: int = STREAM_CHUNK, seen: Seen | None = None
) -> Iterator[Tensor]:
    """`stream_losses` of a text that has an end, a document: a model that adapts and never forgets may read it."""
    limit = model.config.max_positions
    if limit is not None:
        raise InputError(
            f"{model.config.limited_by} cannot stream past position {limit}; "
            "use --protocol windows, or a model with a toeplitz or conv base kernel"
        )
    if len(tokens) < 2:
        raise InputError("the text has fewer than 2 tokens; there is nothing to score")
    device = model.embedding.weight.device
    state = model.initial_state(1)
    for start in range(0, len(tokens) - 1, chunk):
        stop = min(start + chunk, len(tokens) - 1)
        both = tokens[start : stop + 1].long().to(device)[None]
        losses, state = _losses(model, both[:, :-1], both[:, 1:], state)
        if seen is not None:
            seen(stop, state)
        yield losses


def _losses(model: CausalLM, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
    output = model(x, state, y)
    assert output.losses is not None
    return output.losses, output.state
