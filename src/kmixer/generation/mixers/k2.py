"""K2 in a prepared decoding step: S and the last inputs of the filter, one after the other in memory."""

from __future__ import annotations

import ctypes
from typing import Any, cast

import torch

from kmixer.generation.live import ALL_ROWS, Live
from kmixer.generation.operations import MIX, Mixed, Place, Program
from kmixer.generation.panels import RANK_MULTIPLE, padded, whole
from kmixer.layers import K2Mixer, K2State
from kmixer.layers.norms import NORM_EPS
from kmixer.state import map_tensors, tensors


def k2_operations(program: Program, mixer: K2Mixer, normed: int, mixed: int, place: Place) -> Mixed:
    """Queries and keys as one product, and the step of the recurrence and the filter."""
    rank = mixer.query.shape[1]
    wide = whole(rank, RANK_MULTIPLE)
    queries = program.scratch("queries", 2 * wide)
    both = torch.cat([padded(mixer.query, wide), padded(mixer.key, wide)], dim=1)
    program.linear(normed, queries, both.T)
    kernel, base = mixer._kernel(place.shared_kernel), None
    if kernel is not None:
        assert mixer.gate_logit is not None
        base = torch.sigmoid(mixer.gate_logit) * kernel.weights[0]
    program.live.append(LiveMix(len(program.list)))
    program.add(
        MIX,
        normed,
        mixed,
        inputs=mixer.query.shape[0],
        weight=padded(mixer.decay(), wide),
        bias=padded(mixer.alpha().expand(rank), wide),
        extra=base,
        rank=rank,
        lags=0 if base is None else len(base),
        queries=queries,
        eps=NORM_EPS,
    )
    return Mixed(mixer.projection, mixer.output_gate)


class LiveMix(Live):
    """What a layer mixes from; see `Operation` in native/decode_state.h.

    Args:
        index: of its operation in the step.
    """

    def __init__(self, index: int) -> None:
        self._index = index

    def bind(self, program: ctypes.Array[Any]) -> None:
        self._operation = program[self._index]

    def allocate(self, rows: int, n: int, seen: int) -> None:
        mix = self._operation
        mixed = torch.zeros(rows, mix.rank + max(0, mix.lags - 1) + n, whole(mix.inputs))
        self._keys = torch.zeros(rows * n, whole(mix.rank, RANK_MULTIPLE))
        mix.state, mix.span, mix.keys = mixed.data_ptr(), mixed.stride(0), self._keys.data_ptr()
        decay, base = mixed[..., : mix.inputs].split([mix.rank, mixed.shape[1] - mix.rank], dim=1)
        self._state = K2State(decay, base[:, : mix.lags - 1] if mix.lags else None)  # views

    def state(self, chosen: slice = ALL_ROWS) -> K2State:
        return cast(
            "K2State",
            map_tensors(lambda part: part[chosen].clone(memory_format=torch.contiguous_format), self._state),
        )

    def stand_at(self, state: K2State, first: int = 0) -> None:
        for mine, other in zip(tensors(self._state), tensors(state), strict=True):
            mine[first : first + len(other)] = other

    def move(self, source: int, target: int) -> None:
        for part in tensors(self._state):
            part[target] = part[source]
