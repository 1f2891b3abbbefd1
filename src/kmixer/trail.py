"""States after any part of what one call has read: where decoding goes back to when not all of it is kept.

    output = model(tokens, state, trail=True)      as without, and output.trail beside it
    output.trail.at(lengths)                       the state after so many of the tokens, by row

A layer gives its trail in the place of its new state: the same tree, with a log in the place of every tensor. A log is
whatever has `at(lengths)`: the tensor after the first lengths[i] of the n tokens, for each row i of the batch.

* `every`  has the tensors after 0, 1, ... n tokens side by side: what is small, or was made anyway.
* `ends`   keeps the last of entries to which tokens add: caches, windows, the inputs of filters.
* `folded` adds up what tokens bring, as a recurrence does: S <- g S + k x.
* `stepwise` has the tensors after some of the tokens, where the others leave them as they are.

All are declared as Any, since they stand where a state has its tensors.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kmixer.errors import InputError
from kmixer.state import State, common_position, in_order, map_tensors, owned, replaced


@runtime_checkable
class Log(Protocol):
    """What one tensor of a state was after each of the tokens."""

    def at(self, lengths: Int[Tensor, " b"]) -> Tensor:
        """The tensor after the first lengths[i] tokens of row i, in memory of its own."""
        ...


@dataclass(frozen=True)
class Trail:
    """The states in which a model stood while it read `length` tokens in each of `batch` rows.

    It holds the state before and what the tokens brought, which for a state that grows is the state after.
    """

    logs: Any  # the tree of the state
    batch: int
    length: int

    def at(self, lengths: Tensor) -> State:
        """The state after the first lengths[i] tokens of row i: what reading only those gives, to rounding.

        Args:
            lengths: (b,) int64, each from 0 to the number of tokens.

        Raises InputError for other lengths.
        """
        check_lengths(lengths, self.batch, self.length)
        return _at(self.logs, lengths)


def check_lengths(lengths: Tensor, batch: int, most: int) -> None:
    """Raises InputError, one line, for what is not a number of tokens up to `most` for each row of a batch."""
    if lengths.shape != (batch,) or lengths.dtype != torch.int64:
        given = f"{tuple(lengths.shape)} {lengths.dtype}"
        raise InputError(f"lengths: got {given}; allowed: torch.int64, one for each of the {batch} rows")
    if any(not 0 <= length <= most for length in lengths.tolist()):
        raise InputError(f"lengths: got {lengths.tolist()}; allowed: 0 to {most}, the tokens that were read")


def every(tensors: Float[Tensor, "b n_plus_1 *_"] | Int[Tensor, "b n_plus_1 *_"]) -> Any:
    """The log of a tensor whose values after 0, 1, ... n tokens stand on the second axis."""
    return _Every(tensors)


def counted(position: Int[Tensor, " b"], n: int) -> Any:
    """The log of a position that every token moves by one."""
    return _Every(position[:, None] + torch.arange(n + 1, device=position.device))


def unmoved(state: State) -> Any:
    """The trail of a call without tokens."""
    return map_tensors(cast(Any, lambda tensor: _Every(tensor[:, None])), state)


def ends(entries: Tensor, later: Sequence[int], counts: Int[Tensor, "b n_plus_1"] | Int[Tensor, " n_plus_1"]) -> Any:
    """The log of a tensor that keeps the last entries (axis before the last) of those that were there so far.

    Args:
        entries: (b, ..., s, e), with all that the tokens add.
        later: of the s, how many the tokens after the first 0, 1, ... n add.
        counts: how many are kept after these, by row or in all rows; those that keep fewer than others get zeros first.
    """
    return _Ends(entries, tuple(later), counts.expand(len(entries), -1))


def cached(entries: Tensor, position: Int[Tensor, " b"], n: int, most: int | None = None) -> Any:
    """The log of a cache to which each of n tokens adds one entry.

    Args:
        entries: (b, ..., s + n, e): s from before, of which rows at positions below s have fewer, and the new ones.
        position: (b,), before the tokens.
        most: how many entries are kept; None is all.
    """
    new = torch.arange(n + 1, device=position.device)
    counts = torch.minimum(position[:, None] + new, entries.shape[-2] - n + new)
    return ends(entries, range(n, -1, -1), counts if most is None else counts.clamp(max=most))


def last_inputs(tail: Float[Tensor, "b p d"], x: Float[Tensor, "b n d"]) -> Any:
    """The log of the last p inputs, after those of the tail came the n of x."""
    p, n = tail.shape[1], x.shape[1]
    counts = torch.full((n + 1,), p, device=x.device)
    return ends(torch.cat([tail.to(x.dtype), x], dim=1), range(n, -1, -1), counts)


def folded(
    before: Float[Tensor, "b r d"],
    decay: Float[Tensor, " r"] | None,
    keys: Float[Tensor, "b n r"],
    inputs: Float[Tensor, "b n d"],
    after: Float[Tensor, "b r d"],
) -> Any:
    """The log of S <- diag(g) S + k x, one key and one input a token; a decay of None is 1. `after` is S at the end."""
    return _Folded(before, decay, keys, inputs, after)


def stepwise(tensors: Float[Tensor, "b m *_"] | Int[Tensor, "b m *_"], index: Int[Tensor, " n_plus_1"]) -> Any:
    """The log of a tensor that after i of n tokens is the one at index[i] of the second axis."""
    return _Stepwise(tensors, index)


def in_time(first: Any, second: Any, length: int) -> Any:
    """One trail of that of `length` tokens and that of the tokens after them, which says what is between them."""
    if first is None or isinstance(first, Log):
        return None if first is None else _InTime(first, second, length)
    return _like(first, (in_time(*parts, length) for parts in zip(first, second, strict=True)))


def joined(parts: Sequence[Any], members: Sequence[Sequence[int]], *, trail: bool) -> Any:
    """The state, or the trail, of a batch whose rows are `members` of parts of it."""
    return in_rows(parts, members) if trail else in_order(parts, members)


def in_rows(parts: Sequence[Any], members: Sequence[Sequence[int]]) -> Any:
    """One trail of the trails of parts of a batch, whose rows are `members`."""
    return _zip_logs([list(rows) for rows in members], parts)


def asked_for(layer: nn.Module, trail: bool) -> dict[str, Any]:
    """What a layer is called with, that it give its trail: nothing where none is asked for.

    Raises InputError for a layer that has none: whose `forward` does not take `trail`.
    """
    if not trail:
        return {}
    if not torch.compiler.is_compiling() and not _takes_trail(getattr(layer.forward, "__func__", layer.forward)):
        raise InputError(
            f"trail: {type(layer).__name__} gives none; allowed: layers whose forward takes trail=True; "
            "add it there (docs/adding-a-mixer.md), or read the tokens again from a state that you kept"
        )
    return {"trail": True}


@functools.lru_cache(maxsize=256)
def _takes_trail(function: Callable[..., Any]) -> bool:
    return "trail" in inspect.signature(function).parameters


@dataclass(frozen=True)
class _Every:
    tensors: Tensor

    def at(self, lengths: Tensor) -> Tensor:
        return self.tensors[torch.arange(len(lengths), device=lengths.device), lengths]


@dataclass(frozen=True)
class _Ends:
    entries: Tensor
    later: tuple[int, ...]
    counts: Tensor

    def at(self, lengths: Tensor) -> Tensor:
        counts = self.counts.gather(1, lengths[:, None])[:, 0]
        kept: list[int] = counts.tolist()
        width, size = max(kept, default=0), self.entries.shape[-2]
        if (common := common_position(lengths)) is not None and all(count == width for count in kept):
            last = size - self.later[common]
            return owned(self.entries[..., last - width : last, :])
        later = torch.tensor(self.later, device=lengths.device)
        end = size - later[lengths]
        from_end = torch.arange(width, device=lengths.device) - width
        shape = (len(end), *(1,) * (self.entries.ndim - 3), width, 1)
        index = (end[:, None] + from_end).clamp(min=0).view(shape)
        return self.entries.take_along_dim(index, dim=-2).masked_fill((from_end < -counts[:, None]).view(shape), 0)


@dataclass(frozen=True)
class _Folded:
    before: Tensor
    decay: Tensor | None
    keys: Tensor
    inputs: Tensor
    after: Tensor

    def at(self, lengths: Tensor) -> Tensor:
        n, common = self.keys.shape[1], common_position(lengths)
        if common in (0, n):
            return self.after if common == n else self.before
        dtype = self.before.dtype
        age = lengths[:, None] - 1 - torch.arange(n, device=lengths.device)  # of each input; below 0: not kept
        weights = self.keys.to(dtype) * (age >= 0)[..., None]
        kept = self.before
        if self.decay is not None:
            decay = self.decay.to(dtype)
            weights = weights * torch.pow(decay, age.clamp(min=0)[..., None])
            kept = kept * torch.pow(decay, lengths[:, None])[..., None]
        return torch.baddbmm(kept, weights.mT, self.inputs.to(dtype))


@dataclass(frozen=True)
class _Stepwise:
    tensors: Tensor
    index: Tensor

    def at(self, lengths: Tensor) -> Tensor:
        return self.tensors[torch.arange(len(lengths), device=lengths.device), self.index[lengths]]


@dataclass(frozen=True)
class _InTime:
    first: Log
    second: Log
    length: int

    def at(self, lengths: Tensor) -> Tensor:
        later = lengths >= self.length
        if not later.any():
            return self.first.at(lengths)
        second = self.second.at((lengths - self.length).clamp(min=0))
        if later.all():
            return second
        return replaced(self.first.at(lengths.clamp(max=self.length)), second, later)


@dataclass(frozen=True)
class _InRows:
    members: list[list[int]]
    logs: tuple[Log, ...]

    def at(self, lengths: Tensor) -> Tensor:
        parts = [log.at(lengths[rows]) for log, rows in zip(self.logs, self.members, strict=True)]
        return in_order(parts, self.members)


def _at(logs: Any, lengths: Tensor) -> State:
    if isinstance(logs, tuple):
        return _like(logs, (_at(part, lengths) for part in logs))
    return None if logs is None else cast(Log, logs).at(lengths)


def _zip_logs(members: list[list[int]], parts: Sequence[Any]) -> Any:
    first = parts[0]
    if isinstance(first, tuple):
        return _like(first, (_zip_logs(members, together) for together in zip(*parts, strict=True)))
    return None if first is None else _InRows(members, tuple(parts))


def _like(first: Any, parts: Iterator[Any]) -> Any:
    """A tuple of the same kind, plain or named."""
    return first._make(parts) if hasattr(first, "_make") else tuple(parts)
