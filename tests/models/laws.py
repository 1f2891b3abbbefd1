"""Laws that everything with an explicit state keeps: operators, mixers, blocks, stacks and language models."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from kmixer.state import State, tensors

# What is called on a part of the positions, from a state: what comes out, and the state after it.
Call = Callable[[slice, State], tuple[Tensor, State]]


def assert_a_split_gives_the_whole(
    call: Call, t: int, cuts: Iterable[int], *, start: State = None, tolerance: float = 1e-9
) -> None:
    """Pieces of t positions cut there, the state handed on from `start`, against all positions at once from None."""
    whole, final = call(slice(0, t), None)
    state, pieces, cuts = start, [], list(cuts)
    for first, last in zip([0, *cuts], [*cuts, t], strict=True):
        y, state = call(slice(first, last), state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(state, final, rtol=tolerance, atol=tolerance)


def one_at_a_time(t: int) -> range:
    """The cuts after every position."""
    return range(1, t)


def draw_cuts(data: st.DataObject, t: int) -> list[int]:
    """Up to four cuts, pieces without a position among them."""
    return sorted(data.draw(st.lists(st.integers(0, t), max_size=4)))


def of_layer(layer: Any, x: Tensor, *extra: object) -> Call:
    """Calls of a layer or a stack on its input (b, t, d)."""
    return lambda part, state: layer(x[:, part], state, *extra)


def of_model(model: Any, tokens: Tensor) -> Call:
    """Calls of a language model on tokens (b, t): its logits and its state."""

    @torch.no_grad()
    def call(part: slice, state: State) -> tuple[Tensor, State]:
        output = model(tokens[:, part], state)
        return output.logits, output.state

    return call


def assert_close(state: State, expected: State) -> None:
    """Equal to rounding: 1e-12 where any of it is float64, 1e-5 where it is float32."""
    tolerance = 1e-12 if any(tensor.dtype == torch.float64 for tensor in tensors(expected)) else 1e-5
    torch.testing.assert_close(state, expected, rtol=tolerance, atol=tolerance)


def assert_owns_its_memory(state: State) -> None:
    """No tensor is a view of more."""
    for tensor in tensors(state):
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


def draw_rows(data: st.DataObject, most: int = 12) -> tuple[list[int], int, list[int]]:
    """Positions of two to three rows, the length of a chunk, and how much of it is kept of each row."""
    positions = data.draw(st.lists(st.integers(0, 20), min_size=2, max_size=3))
    if data.draw(st.booleans()):
        positions = [positions[0]] * len(positions)
    n = data.draw(st.integers(1, most))
    lengths = [data.draw(st.sampled_from([0, n, *range(n)])) for _ in positions]
    if data.draw(st.booleans()):
        lengths = [lengths[0]] * len(lengths)
    return positions, n, lengths
