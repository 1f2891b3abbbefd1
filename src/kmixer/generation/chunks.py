"""Reading a chunk of tokens and then keeping a prefix of it, for a decoder that only goes forward.

    logits = reader.read(tokens)      (b, n) to (b, n, v), and stays
    reader.commit(lengths)            stand after so many (b,) of the tokens of the last read, by row

`ReadAgain` keeps a snapshot, and reads what is kept a second time: right for every decoder, and dear.
"""

from __future__ import annotations

from typing import Protocol

from jaxtyping import Float, Int
from torch import Tensor

from kmixer.generation.decoder import Decoder, open_decoder
from kmixer.models.causal_lm import CausalLM
from kmixer.state import State, join, rows


class Reader(Decoder, Protocol):
    """A decoder that reads ahead. Whatever else moves it forgets what was read and not committed."""

    def read(self, tokens: Tensor) -> Tensor:
        """Logits (b, n, v) after each of the tokens (b, n); the sequences stay. Another read forgets this one."""
        ...

    def commit(self, lengths: Tensor) -> None:
        """Stand after so many tokens (b,) of the last read, 0 to n, by row."""
        ...


class ReadAgain:
    """A `Reader` made of any decoder.

    Args:
        decoder: it belongs to the reader from now on.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._read: tuple[State, Tensor] | None = None  # the state before, and the tokens

    def read(self, tokens: Int[Tensor, "b n"]) -> Float[Tensor, "b n v"]:
        self._go_back()
        before = self._decoder.state()
        logits = self._decoder.advance(tokens)
        self._read = (before, tokens)
        return logits

    def commit(self, lengths: Int[Tensor, " b"]) -> None:
        assert self._read is not None
        (before, tokens), self._read = self._read, None
        counts = lengths.tolist()
        if any(count != tokens.shape[1] for count in counts):
            read_again(self._decoder, before, tokens, counts)

    def advance(self, tokens: Int[Tensor, "b n"]) -> Float[Tensor, "b n v"]:
        self._go_back()
        return self._decoder.advance(tokens)

    def step(self, tokens: Int[Tensor, " b"]) -> Float[Tensor, "b v"]:
        self._go_back()
        return self._decoder.step(tokens)

    def state(self) -> State:
        return self._decoder.state() if self._read is None else self._read[0]

    def restore(self, state: State) -> None:
        self._read = None
        self._decoder.restore(state)

    def _go_back(self) -> None:
        if self._read is not None:
            self._decoder.restore(self._read[0])
            self._read = None


def open_reader(model: CausalLM, state: State) -> Reader:
    """The fastest reader that the model has."""
    return ReadAgain(open_decoder(model, state))


def read_again(decoder: Decoder, before: State, tokens: Int[Tensor, "b n"], lengths: list[int]) -> None:
    """Let a decoder stand after so many of the tokens, by row, from the state before the first of them."""
    order, states = [], []
    for length in sorted(set(lengths)):
        chosen = [row for row, other in enumerate(lengths) if other == length]
        everyone = len(chosen) == len(lengths)
        decoder.restore(before if everyone else rows(before, chosen))
        if length:
            decoder.advance(tokens[chosen, :length])
        if everyone:
            return
        order += chosen
        states.append(decoder.state())
    decoder.restore(rows(join(states), [order.index(row) for row in range(len(order))]))
