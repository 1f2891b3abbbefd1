"""Reading a chunk of tokens and keeping a part of it, for a model that has a mixer without a trail.

`ReadAgain` keeps a snapshot, and reads what is kept a second time: right for every decoder, and dear.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from jaxtyping import Float, Int
from torch import Tensor

from kmixer.generation.decoder import Decoder, EagerDecoder, open_decoder
from kmixer.layers import Block
from kmixer.models.causal_lm import CausalLM
from kmixer.state import State, in_order, rows


class ReadAgain:
    """A `Decoder` whose `read` and `commit` are made of another's `advance`, `state` and `restore`.

    Args:
        decoder: it belongs to this one from now on.
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


def open_reader(model: CausalLM, state: State) -> Decoder:
    """The fastest decoder that the model has for reading ahead."""
    decoder = open_decoder(model, state)
    return ReadAgain(decoder) if isinstance(decoder, EagerDecoder) and not leaves_a_trail(model) else decoder


def leaves_a_trail(model: CausalLM) -> bool:
    """Whether all layers of the model take `trail`, see `kmixer.trail`; somebody else's mixer may not."""
    blocks = [part for part in model.stack.modules() if isinstance(part, Block)]
    layers = (model.stack, *model.stack.blocks, *blocks, *(block.mixer for block in blocks))
    return all("trail" in inspect.signature(layer.forward).parameters for layer in layers)


def read_again(decoder: Decoder, before: State, tokens: Int[Tensor, "b n"], lengths: list[int]) -> None:
    """Let a decoder stand after so many of the tokens, by row, from the state before the first of them."""
    states: dict[int, State] = {}
    for length in sorted(set(lengths)):
        decoder.restore(before)
        if length:
            decoder.advance(tokens[:, :length])
        states[length] = decoder.state()
    if len(states) > 1:
        decoder.restore(of_rows(states, lengths))


def of_rows(states: Mapping[int, State], lengths: list[int]) -> State:
    """The state whose row i is that of states[lengths[i]]."""
    different = sorted(set(lengths))
    if len(different) == 1:
        return states[different[0]]
    members = [[row for row, other in enumerate(lengths) if other == length] for length in different]
    return in_order([rows(states[length], of_it) for length, of_it in zip(different, members, strict=True)], members)
