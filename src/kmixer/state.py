"""What a sequence carries from one call to the next: an immutable tree of tensors, batch first.

    y, state = layer(x, state)        a new state; the old one is as it was: keeping it is a snapshot

A state is a tensor, None, or a tuple (plain or named) of states. Its tensors own their memory, have the batch as
their first axis, and count positions as int64 (b,), so that the rows of one batch may stand at different positions.
Caches that grow have the positions on the axis before the last, and end together: a row that has seen fewer
positions than another has padding at the beginning, which no layer reads.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor

from kmixer.errors import InputError

if TYPE_CHECKING:
    State = Tensor | tuple["State", ...] | None
else:  # what checks annotations at run time cannot follow a type that holds itself
    State = Tensor | tuple | None
AState = TypeVar("AState", bound=State)  # one kind of state: what comes out is what went in


def rows(state: AState, indices: Tensor | Sequence[int]) -> AState:
    """The rows of the batch that `indices` names, in that order: chosen, repeated or put in another order.

    Args:
        state: of b rows.
        indices: n numbers from 0 to b - 1.

    Returns:
        A state of n rows, with memory of its own.

    Raises:
        InputError: an index that is no row.
    """
    wanted = torch.as_tensor(indices, dtype=torch.int64)
    first = next(tensors(state), None)
    if first is not None and wanted.numel() and not 0 <= int(wanted.min()) <= int(wanted.max()) < len(first):
        raise InputError(f"rows: got {wanted.tolist()}; allowed: 0 to {len(first) - 1}, the rows of this state")
    return cast(AState, map_tensors(lambda tensor: tensor.index_select(0, wanted.to(tensor.device)), state))


def join(states: Sequence[AState]) -> AState:
    """The batches one after the other; caches of rows at different positions are padded at their beginning.

    Args:
        states: one or more, of one model; as many rows each as they like.

    Returns:
        A state of all rows, with memory of its own.

    Raises:
        InputError: no state, or states of different models.
    """
    if not states:
        raise InputError("join: got no state; give one or more")
    return cast(AState, _join(states))


def in_order(parts: Sequence[AState], members: Sequence[Sequence[int]]) -> AState:
    """One batch of the parts of one: the rows of parts[i], in their order, are its rows members[i].

    Raises InputError as `join` does.
    """
    return rows(join(parts), torch.tensor([row for of_part in members for row in of_part]).argsort())


def replaced(state: AState, others: AState, chosen: Tensor) -> AState:
    """The state with the chosen rows those of another state of as many, in the precision that the first has.

    Args:
        state, others: of b rows, of one model.
        chosen: (b,) bool: which rows are those of `others`.
    """
    keep = torch.arange(len(chosen), device=chosen.device) + len(chosen) * chosen
    return rows(join([state, cast(AState, _in_precision_of(others, state))]), keep)


def parts_between(begins: Bool[Tensor, "b t"]) -> Iterator[tuple[int, int]]:
    """First and last + 1 of the parts that t positions are cut into, before every one at which a row begins anew."""
    cuts = [0, *(index for index, cut in enumerate(begins.any(0).tolist()) if cut and index), begins.shape[1]]
    return itertools.pairwise(cuts)


def nbytes(state: State) -> int:
    """Bytes that the state keeps in memory; memory that several of its tensors share counts once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors(state)}
    return sum(storage.nbytes() for storage in storages.values())


def batch_of(state: State) -> int:
    """Rows of a state; 0 of one that holds no tensor."""
    return next((len(tensor) for tensor in tensors(state) if tensor.ndim), 0)


def tensors(state: State) -> Iterator[Tensor]:
    """The tensors of the tree, in order."""
    if isinstance(state, Tensor):
        yield state
    elif state is not None:
        for part in state:
            yield from tensors(part)


def map_tensors(change: Callable[[Tensor], Tensor], state: State) -> State:
    """The same tree of the changed tensors."""
    if state is None or isinstance(state, Tensor):
        return None if state is None else change(state)
    return _like(state, [map_tensors(change, part) for part in state])


def owned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where it is a view of more memory, which a state would keep.

    With gradients it stays as it is: their graph keeps that memory, and nothing can be written over it unseen.
    """
    if torch.is_grad_enabled():
        return tensor
    if torch.compiler.is_compiling():
        return tensor.clone()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def common_position(position: Int[Tensor, " b"]) -> int | None:
    """The position of all rows, 0 of none; None where they differ. On a GPU this waits for the device."""
    positions: list[int] = position.tolist()
    return None if any(other != positions[0] for other in positions) else positions[0] if positions else 0


def known_position(position: Int[Tensor, " b"]) -> int | None:
    """The same, and None under torch.compile: for a layer that can do rows at several positions at once."""
    return None if torch.compiler.is_compiling() else common_position(position)


def longest(position: Int[Tensor, " b"], kept: int) -> int:
    """How many of the `kept` positions of a cache any row has seen; under torch.compile, all may be."""
    return kept if torch.compiler.is_compiling() else min(kept, max(position.tolist(), default=0))


def check_state(state: State, initial: State, batch: int) -> None:
    """Raises InputError, one line, for a state that is not one of the model whose initial state is given.

    Of the initial state, a tensor may differ in its batch, which is `batch` here; in its positions, where it begins
    with none; and in its precision, which autocast narrows.
    """
    if _fits(state, initial, batch):
        return
    if problem := _difference(state, initial, batch):
        raise InputError(f"state: {problem}; give what this model returned for a batch of {batch}, or None to begin")


def _fits(state: State, initial: State, batch: int) -> bool:
    """Whether a state is just what one expects, asked at every call; of what is not, `_difference` knows more."""
    if type(state) is not type(initial):
        return False
    if isinstance(initial, Tensor) and isinstance(state, Tensor):
        shape, like = state.shape, initial.shape
        if state.dtype is not initial.dtype or shape[0] != batch or len(shape) != len(like):
            return False
        if state.device != initial.device:
            return False
        grows = len(like) > 2 and like[-2] == 0
        return shape[1:] == like[1:] or (grows and shape[-1] == like[-1] and shape[1:-2] == like[1:-2])
    if isinstance(initial, tuple) and isinstance(state, tuple):
        if len(state) != len(initial):
            return False
        for part, other in zip(state, initial, strict=True):  # a generator within all() takes half as long again
            if not _fits(part, other, batch):
                return False
    return True


def _difference(state: State, initial: State, batch: int, path: str = "") -> str | None:
    """What is wrong with a state, and where; None where it fits."""
    where = f" at {path}" if path else ""
    if not isinstance(initial, Tensor):
        if type(state) is not type(initial) or (isinstance(state, tuple) and len(state) != len(initial or ())):
            return f"got {_described(state)}{where}; allowed there: {_described(initial)}"
        for index, (part, other) in enumerate(zip(state or (), initial or (), strict=True)):
            names = getattr(initial, "_fields", None)
            name = names[index] if names else str(index)
            assert not isinstance(part, str)
            if problem := _difference(part, other, batch, f"{path}.{name}" if path else name):
                return problem
        return None
    allowed = [batch, *initial.shape[1:]]
    if not isinstance(state, Tensor):
        return f"got {_described(state)}{where}; allowed there: a tensor {tuple(allowed)}"
    if initial.ndim > 2 and initial.shape[-2] == 0 and state.ndim == initial.ndim:
        allowed[-2] = state.shape[-2]
    if list(state.shape) != allowed:
        return f"got {tuple(state.shape)}{where}; allowed there: {tuple(allowed)}"
    narrower = torch.promote_types(state.dtype, initial.dtype) == initial.dtype
    if not narrower or state.is_floating_point() != initial.is_floating_point():
        return f"got {state.dtype}{where}; allowed there: {initial.dtype}"
    return None if state.device == initial.device else f"got {state.device}{where}; allowed there: {initial.device}"


def _described(state: object) -> str:
    if isinstance(state, Tensor):
        return f"a tensor {tuple(state.shape)}"
    return f"{len(state)} parts ({type(state).__name__})" if isinstance(state, tuple) else type(state).__name__


def _like(first: tuple[State, ...], parts: list[State]) -> tuple[State, ...]:
    """A tuple of the same kind, plain or named, of other parts."""
    return first._make(parts) if hasattr(first, "_make") else tuple(parts)


def _join(states: Sequence[State]) -> State:
    first = states[0]
    if isinstance(first, Tensor):
        return _join_tensors([_same_kind(state, first) for state in states])
    if first is None:
        if any(state is not None for state in states):
            raise _different()
        return None
    branches: list[tuple[State, ...]] = []
    for state in states:
        if type(state) is not type(first) or not isinstance(state, tuple) or len(state) != len(first):
            raise _different()
        branches.append(state)
    return _like(first, [_join(parts) for parts in zip(*branches, strict=True)])


def _in_precision_of(state: State, like: State) -> State:
    if isinstance(state, Tensor):
        return state.to(like.dtype) if isinstance(like, Tensor) else state
    if state is None or not isinstance(like, tuple):
        return state
    return _like(state, [_in_precision_of(*parts) for parts in zip(state, like, strict=True)])


def _same_kind(state: State, first: Tensor) -> Tensor:
    """The state, a tensor that differs from the first in its batch and in the axis before the last at most."""
    if not isinstance(state, Tensor) or state.ndim != first.ndim:
        raise _different()
    same = (slice(1, -2), slice(-1, None)) if first.ndim > 2 else (slice(1, None),)
    if state.dtype != first.dtype or any(state.shape[part] != first.shape[part] for part in same):
        raise _different()
    return state


def _different() -> InputError:
    return InputError("join: the states are of different models or dtypes; give states that one model returned")


def _join_tensors(parts: list[Tensor]) -> Tensor:
    """One after the other along the batch, zeros before those that are shorter."""
    if parts[0].ndim > 2:
        longest = max(part.shape[-2] for part in parts)
        parts = [F.pad(part, (0, 0, longest - part.shape[-2], 0)) for part in parts]
    return torch.cat(parts)
