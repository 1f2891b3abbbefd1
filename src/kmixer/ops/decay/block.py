"""Decayed linear attention by matrix products over chunks: backend `block`.

Inside a chunk of c positions, A_ij = sum_r q_i k_j g^(i-j) for j <= i is one matrix product of q g^(i-m) and
k g^(m-j): the midpoint m halves the largest exponent. Between chunks goes the state. What the backward needs
beyond the inputs, the state before every chunk, is computed again there.

An operator of torch's, because how long a chunk may be depends on the decays: torch.compile could not follow it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kmixer.ops.decay.operator import LEAST_LOG_DECAY, decay_operator

# More rows a chunk cost more in the (c, c) product than they save in chunk states.
MAX_CHUNK = 32
# The scaled queries and keys reach g^-(c-1)/2. exp(48) leaves 40 nats to either end of float32's
# range for the inputs themselves, and admits every g >= 0.05 at c = 32.
MAX_EXPONENT = 48.0


def _forward(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Every chunk's own positions by its scores, those before it by its state."""
    parts, final = _cut(q, k, v, log_decay, state)
    outputs = [
        torch.baddbmm(_scores(part) @ part.v, part.q * part.scales.start_to_query, part.starts) for part in parts
    ]
    return _join(outputs, v.shape[0]), final


def _backward(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, dy: Tensor, dfinal: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the five inputs, from the last chunk to the first."""
    b = v.shape[0]
    parts, _ = _cut(q, k, v, log_decay, state)
    dlog_decay = torch.zeros_like(log_decay)
    dstate = dfinal
    gradients: list[tuple[Tensor, Tensor, Tensor]] = []
    for part in reversed(parts):
        scales = part.scales
        c = len(scales.position)
        d_part = dy[:, part.positions].reshape(part.v.shape)
        updates = (part.q * scales.start_to_query).mT @ d_part
        ends, dstate = _scan(updates.unflatten(0, (b, -1)).flip(1), dstate, scales.whole)
        ends = ends.flip(1).flatten(0, 1)  # gradient of the state after each chunk

        dv = torch.baddbmm(_scores(part).mT @ d_part, part.k * scales.key_to_end, ends)
        dscores = (d_part @ part.v.mT).tril_()
        dq_inner = (dscores @ (part.k * scales.middle_to_key)) * scales.query_to_middle
        dk_inner = (dscores.mT @ (part.q * scales.query_to_middle)) * scales.middle_to_key
        dq_outer = (d_part @ part.starts.mT) * scales.start_to_query
        dk_outer = (part.v @ ends.mT) * scales.key_to_end
        gradients.insert(0, (dq_inner + dq_outer, dk_inner + dk_outer, dv))

        # Every term carries g to the power of its lag, so d/dlog g multiplies it by the lag.
        # Lags are taken inside a chunk: sums over global positions would cancel to nothing.
        position = scales.position
        inner = (position * (part.q * dq_inner - part.k * dk_inner).sum(0)).sum(0)
        outer = ((position + 1) * (part.q * dq_outer).sum(0) + (c - 1 - position) * (part.k * dk_outer).sum(0)).sum(0)
        dlog_decay += inner + outer + c * scales.whole[:, 0] * (part.starts * ends).sum((0, 2))
    dq, dk, dv = (_join(list(chunks), b) for chunks in zip(*gradients, strict=True))
    return dq, dk, dv, dlog_decay, dstate


block_decay = decay_operator("block_decay", _forward, _backward)


class _Scales:
    """Powers of the decays inside a chunk of c positions, each (c, r); `whole` is g^c (r, 1)."""

    def __init__(self, log_decay: Tensor, c: int) -> None:
        log_decay = log_decay.clamp(min=LEAST_LOG_DECAY)
        position = torch.arange(c, device=log_decay.device, dtype=log_decay.dtype)[:, None]
        middle = (c - 1) / 2
        self.position = position
        self.query_to_middle = torch.exp(log_decay * (position - middle))
        self.middle_to_key = torch.exp(log_decay * (middle - position))
        self.start_to_query = torch.exp(log_decay * (position + 1))
        self.key_to_end = torch.exp(log_decay * (c - 1 - position))
        self.whole = torch.exp(log_decay * c)[:, None]


class _Part(NamedTuple):
    """Consecutive chunks of one length c: q, k, v (b n, c, .), and the states before them (b n, r, d)."""

    positions: slice
    scales: _Scales
    q: Tensor
    k: Tensor
    v: Tensor
    starts: Tensor


def _cut(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> tuple[list[_Part], Tensor]:
    """All whole chunks, then what is left as one shorter chunk, where there is any; and the state after both."""
    b, t, _ = v.shape
    chunk = _chunk_length(log_decay)
    whole = t - t % chunk
    parts = []
    for start, stop, c in ((0, whole, chunk), (whole, t, t - whole)):
        if start == stop:
            continue
        scales, positions = _Scales(log_decay, c), slice(start, stop)
        q_part, k_part, v_part = (x[:, positions].reshape(-1, c, x.shape[-1]) for x in (q, k, v))
        updates = (k_part * scales.key_to_end).mT @ v_part
        starts, state = _scan(updates.unflatten(0, (b, -1)), state, scales.whole)
        parts.append(_Part(positions, scales, q_part, k_part, v_part, starts.flatten(0, 1)))
    return parts, state


def _chunk_length(log_decay: Tensor) -> int:
    """The longest power of two up to MAX_CHUNK whose scaling exponents stay within MAX_EXPONENT."""
    steepest = -float(log_decay.detach().min())
    chunk = MAX_CHUNK
    while chunk > 1 and steepest * (chunk - 1) / 2 > MAX_EXPONENT:
        chunk //= 2
    return chunk


def _scores(part: _Part) -> Tensor:
    # The discarded triangle may overflow; tril drops it without reading it.
    scaled_queries, scaled_keys = part.q * part.scales.query_to_middle, part.k * part.scales.middle_to_key
    return (scaled_queries @ scaled_keys.mT).tril_()


def _scan(updates: Tensor, state: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
    """State before each of n chunks (b, n, r, d), and after the last (b, r, d)."""
    before = torch.empty_like(updates)
    for i, update in enumerate(updates.unbind(1)):
        before[:, i] = state
        state = torch.addcmul(update, state, decay)
    return before, state


def _join(parts: list[Tensor], b: int) -> Tensor:
    """(b, t, .) of the chunks (b n, c, .) of every part."""
    joined = [part.reshape(b, -1, part.shape[-1]) for part in parts]
    return joined[0] if len(joined) == 1 else torch.cat(joined, dim=1)
