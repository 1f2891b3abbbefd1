"""Fast weights while they are decoded: of one layer, for every row a matrix of its own, changed in place."""

from __future__ import annotations

import ctypes
import functools
import math

import torch

from kmixer.errors import InputError
from kmixer.generation.live import ALL_ROWS, Live
from kmixer.generation.panels import PANEL, padded, panels, whole
from kmixer.layers import FastWeights
from kmixer.layers.fast_weights import FastState
from kmixer.layers.linear import Linear


class Adapting(ctypes.Structure):
    """`FastWeights` in native/decode_fast_weights.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "taps", "target")),
        *((name, ctypes.c_void_p) for name in ("learned", "panels", "hidden", "targets", "positions")),
        *((name, ctypes.c_int64) for name in ("source", "count", "chunk", "reset_every", "f", "d", "room")),
        *((name, ctypes.c_float) for name in ("decay", "rate", "largest", "unused")),
    )


class LiveWeights(Live):
    """The fast weights of a layer, and what their rows have read of an unfinished chunk.

    Args:
        fast: fast weights with chunks of two tokens or more.
        down: the matrix that they are added to.
        source: the buffer of what their targets are made of.
    """

    def __init__(self, fast: FastWeights, down: Linear, source: int) -> None:
        assert fast.filter is not None
        (d, f), wide = down.weight.shape, whole(down.weight.shape[0])
        self._weight = panels(down.weight.detach(), down.bias).contiguous()
        self._taps = padded(fast.filter.detach().T, wide).contiguous()
        self._target = padded(fast.target.detach(), wide).contiguous()
        norm = float(torch.linalg.vector_norm(down.weight.detach()))
        self.layer = Adapting(
            weight=self._weight.data_ptr(),
            taps=self._taps.data_ptr(),
            target=self._target.data_ptr(),
            source=source,
            count=len(self._taps),
            chunk=fast.chunk,
            reset_every=fast.reset_every or 0,
            f=f,
            d=d,
            decay=float(fast.decay()),
            rate=fast.rate,
            largest=math.inf if fast.max_norm is None else fast.max_norm * norm,
        )
        self.where = ctypes.addressof(self.layer)

    def allocate(self, rows: int, n: int, seen: int) -> None:
        layer, wide = self.layer, whole(self.layer.d)
        zeros = functools.partial(torch.zeros, dtype=torch.float32)
        layer.room = layer.chunk + n
        self._learned = zeros(rows, layer.f, wide)
        self._panels = zeros(rows, *self._weight.shape)
        self._hidden = zeros(rows, layer.room, layer.f)
        self._targets = zeros(rows, layer.room, wide)
        self._positions = torch.zeros(rows, dtype=torch.int64)
        for name in ("learned", "panels", "hidden", "targets", "positions"):
            setattr(layer, name, getattr(self, f"_{name}").data_ptr())

    def state(self, chosen: slice = ALL_ROWS) -> FastState:
        layer, positions = self.layer, self._positions[chosen].clone()
        begun = (positions % layer.chunk).tolist()
        most = max(begun, default=0)
        hidden = self._hidden.new_zeros(len(begun), most, layer.f)
        targets = self._targets.new_zeros(len(begun), most, layer.d)
        of_hidden, of_targets = self._hidden[chosen], self._targets[chosen]
        for row, count in enumerate(begun):
            hidden[row, most - count :] = of_hidden[row, :count]
            targets[row, most - count :] = of_targets[row, :count, : layer.d]
        learned = self._learned[chosen][..., : layer.d].clone(memory_format=torch.contiguous_format)
        return FastState(learned, hidden, targets, positions)

    def stand_at(self, state: FastState, first: int = 0) -> None:
        layer, count = self.layer, len(state.position)
        mine = slice(first, first + count)
        self._learned[mine, :, : layer.d] = state.weights
        self._positions[mine] = state.position
        self._panels[mine] = self._weight
        self._panels[mine, :, :-1] += self._learned[mine].unflatten(-1, (-1, PANEL)).transpose(1, 2)
        kept = state.hidden.shape[1]
        for row, begun in enumerate(self._begun(state)):
            self._hidden[first + row, :begun] = state.hidden[row, kept - begun :]
            self._targets[first + row, :begun, : layer.d] = state.targets[row, kept - begun :]

    def move(self, source: int, target: int) -> None:
        for part in (self._learned, self._panels, self._hidden, self._targets, self._positions):
            part[target] = part[source]

    def check(self, state: FastState) -> None:
        """Raises InputError for a state whose unfinished chunks are shorter than its positions say."""
        kept, needed = state.hidden.shape[1], max(self._begun(state), default=0)
        if state.targets.shape[1] != kept or kept < needed:
            raise InputError(
                f"state: got {kept} and {state.targets.shape[1]} positions of an unfinished chunk; allowed there: "
                f"equally many, {needed} or more as the rows have read; give what this model returned"
            )

    def _begun(self, state: FastState) -> list[int]:
        counts: list[int] = (state.position % self.layer.chunk).tolist()
        return counts
