"""Keys and values of an attention layer while it is decoded: a ring of positions for every row and head."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from kmixer.errors import InputError
from kmixer.generation.live import ALL_ROWS, Live
from kmixer.generation.panels import whole
from kmixer.layers.norms import NORM_EPS
from kmixer.layers.rotary import rotary_frequencies
from kmixer.state import State

BLOCK = 64  # positions that are read at once: kBlock in native/decode_attention.h
LANES = 16  # heads are padded to whole vectors of any processor
# Positions that a layer without a window has room for at first; when they are full, it has half as many more.
FIRST_POSITIONS = 256


class Cache(Protocol):
    """The state of an attention layer."""

    keys: Tensor
    values: Tensor | None
    position: Tensor


class Attending(ctypes.Structure):
    """`Attention` in native/decode_attention.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("frequencies", "scales", "keys", "values", "positions")),
        *((name, ctypes.c_int64) for name in ("heads", "e", "wide", "room", "reach", "query", "key", "value")),
        *((name, ctypes.c_int64) for name in ("source", "gates", "added")),
        *((name, ctypes.c_int64) for name in ("gaussian", "normalise", "normalise_values", "exclude_self")),
        ("eps", ctypes.c_float),
        ("bf16", ctypes.c_int32),
    )


class LiveCache(Live):
    """The keys and values that the rows of a layer may still look at.

    Args:
        make: the state of (keys, values, positions); values are None where they are the keys.
        heads, head_width: h and e.
        scales: (h,), of products of queries and keys, or 1 / sigma^2.
        reach: positions that are seen, the own included; None is all.
        rotary: turn queries and keys by their positions.
        apart: whether values are other vectors than the keys.
        dtype: in which keys and values are kept; states have float32.
        options: the other fields of `Attending`.
    """

    def __init__(
        self,
        make: Callable[[Tensor, Tensor | None, Tensor], State],
        heads: int,
        head_width: int,
        scales: Tensor,
        reach: int | None,
        *,
        rotary: bool,
        apart: bool,
        dtype: torch.dtype,
        **options: int,
    ) -> None:
        self._make, self._apart, self.reach, self._dtype = make, apart, reach, dtype
        self._scales = scales.contiguous()
        self._frequencies = rotary_frequencies(head_width) if rotary else None
        self.layer = Attending(
            frequencies=None if self._frequencies is None else self._frequencies.data_ptr(),
            scales=self._scales.data_ptr(),
            heads=heads,
            e=head_width,
            wide=whole(head_width, LANES),
            reach=reach or 0,
            eps=NORM_EPS,
            bf16=dtype == torch.bfloat16,
            **{"gates": -1, "added": -1, **options},
        )
        self.where = ctypes.addressof(self.layer)

    def seen(self, state: Cache) -> int:
        return max(state.position.tolist(), default=0)

    def check(self, state: Cache) -> None:
        kept, needed = state.keys.shape[2], self._kept(self.seen(state))
        if kept < needed or (state.values is not None and state.values.shape[2] != kept):
            raise InputError(
                f"state: got {kept} keys of an attention layer; allowed there: {needed} or more as the rows have read, "
                "and as many values; give what this model returned"
            )

    def allocate(self, rows: int, n: int, seen: int) -> None:
        layer = self.layer
        needed = seen + seen // 2 + max(n, FIRST_POSITIONS) if self.reach is None else self.reach - 1 + n
        layer.room = whole(needed, BLOCK)
        self.room = layer.room if self.reach is None else math.inf
        shape = (rows, layer.heads, layer.room, layer.wide)
        self._keys = torch.zeros(shape, dtype=self._dtype)
        self._values = torch.zeros_like(self._keys) if self._apart else self._keys
        self._positions = torch.zeros(rows, dtype=torch.int64)
        for name in ("keys", "values", "positions"):
            setattr(layer, name, getattr(self, f"_{name}").data_ptr())

    def state(self, chosen: slice = ALL_ROWS) -> State:
        position = self._positions[chosen].clone()
        values = self._last(self._values[chosen], position) if self._apart else None
        return self._make(self._last(self._keys[chosen], position), values, position)

    def stand_at(self, state: Cache, first: int = 0) -> None:
        rings = [(self._keys, state.keys)]
        if state.values is not None:
            rings.append((self._values, state.values))
        for index, position in enumerate(state.position.tolist()):
            row, slots = first + index, self._slots(position)
            self._positions[row] = position
            for ring, kept in rings:
                # What other sequences left goes: a number that overflowed would spoil what it is weighed with 0.
                ring[row] = 0
                ring[row, :, slots, : self.layer.e] = kept[index, :, kept.shape[2] - len(slots) :].to(ring.dtype)

    def move(self, source: int, target: int) -> None:
        for part in (self._keys, self._values, self._positions):
            part[target] = part[source]

    def _last(self, ring: Tensor, position: Tensor) -> Tensor:
        """The last positions (b, h, s, e) of rows, padded where they have seen fewer."""
        positions: list[int] = position.tolist()
        most = self._kept(max(positions, default=0))
        last = torch.zeros(len(ring), self.layer.heads, most, self.layer.e)
        for row, seen in enumerate(positions):
            slots = self._slots(seen)
            last[row, :, most - len(slots) :] = ring[row, :, slots, : self.layer.e].float()
        return last

    def _slots(self, position: int) -> Tensor:
        """Where the positions lie that a row at this one may still look at."""
        return torch.arange(position - self._kept(position), position) % self.layer.room

    def _kept(self, position: int) -> int:
        return position if self.reach is None else min(position, self.reach - 1)
