"""Triton kernels of decayed linear attention; `launch` launches them and says how they fit together.

A program owns a row of the batch, a segment of LENGTH positions and a tile of D columns of d, and walks
through the segment in chunks of CHUNK positions with the (RANK, D) state in registers; RANK is r padded to
a power of two. Powers of the decays are taken over places inside a chunk (0 to CHUNK - 1), never over
positions: they stay in range for every t. A chunk that t cuts short has `count` < CHUNK places: its keys
decay to its last real place, and what stands beyond it is loaded as zeros.

All sums are float32; PRECISION is how tl.dot rounds its operands. Nothing is shared between programs.
"""

import triton
import triton.language as tl


@triton.jit
def _place(t, segments, d: tl.constexpr, LENGTH: tl.constexpr, D: tl.constexpr):
    """What this program owns: batch row, segment, first position in (b t), length, tile, its columns of d."""
    # The tiles of one segment are neighbours, so that they read q and k from cache.
    tiles: tl.constexpr = (d + D - 1) // D
    program = tl.program_id(0)
    tile = program % tiles
    segment = (program // tiles) % segments
    # b t d may pass 2^31: offsets up to the segment are 64 bits wide, those inside it 32.
    batch = (program // tiles // segments).to(tl.int64)
    length = tl.minimum(t - segment * LENGTH, LENGTH)
    return batch, segment, batch * t + segment * LENGTH, length, tile, tile * D + tl.arange(0, D)


@triton.jit
def _load(base, positions, length, columns, width: tl.constexpr, stride: tl.constexpr):
    mask = (positions[:, None] < length) & (columns[None, :] < width)
    return tl.load(base + positions[:, None] * stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(base, values, positions, length, columns, width: tl.constexpr, stride: tl.constexpr):
    mask = (positions[:, None] < length) & (columns[None, :] < width)
    tl.store(base + positions[:, None] * stride + columns[None, :], values.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _load_edge(edge, at_edge, batch, ranks, columns, r: tl.constexpr, d: tl.constexpr):
    """`edge` (b, r, d) where the program is at that end of the sequence, else zeros: then no row is read."""
    return _load(edge + batch * (r * d), ranks, tl.where(at_edge, r, 0), columns, d, d)


@triton.jit
def _load_boundary(edge, interior, at_edge, batch, slots, slot, ranks, columns, r: tl.constexpr, d: tl.constexpr):
    """The state on one side of a segment: `edge` (b, r, d) at that end of the sequence, else a slot of `interior`."""
    inner = interior + (batch * slots + slot) * (r * d)
    return _load_edge(edge, at_edge, batch, ranks, columns, r, d) + _load(
        inner, ranks, tl.where(at_edge, 0, r), columns, d, d
    )


@triton.jit
def _store_edge(edge, values, at_edge, batch, ranks, columns, r: tl.constexpr, d: tl.constexpr):
    _store(edge + batch * (r * d), values, ranks, tl.where(at_edge, r, 0), columns, d, d)


@triton.jit
def _power(log_decay, exponents):
    """decay ** exponent (CHUNK, RANK)."""
    return tl.exp(exponents[:, None] * log_decay[None, :])


@triton.jit
def _load_log_decay(log_decay, ranks, r: tl.constexpr):
    return tl.load(log_decay + ranks, mask=ranks < r, other=0.0)


@triton.jit(do_not_specialize=["t", "segments"])
def segment_updates(
    keys, values, log_decay, edge, interior, t, segments,
    r: tl.constexpr, d: tl.constexpr, LENGTH: tl.constexpr, CHUNK: tl.constexpr, RANK: tl.constexpr,
    D: tl.constexpr, PRECISION: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """What each segment adds to the state at its end, or, reversed, to the gradient of the state at its start.

    Into `interior` (b, segments - 1, r, d), one slot a boundary between two segments. The segment at the edge
    of the sequence adds the decayed `edge` too, so that `scan_segments` can start from nothing.
    """
    batch, slot, _, _, _, columns = _place(t, segments - 1, d, LENGTH, D)
    segment = slot + 1 if REVERSE else slot
    start = batch * t + segment * LENGTH
    length = tl.minimum(t - segment * LENGTH, LENGTH)
    offset = tl.arange(0, CHUNK)
    ranks = tl.arange(0, RANK)
    log_g = _load_log_decay(log_decay, ranks, r)
    whole = tl.exp(log_g * CHUNK)[:, None]
    # Forward segments are never cut short. A reversed one may be: its weights count from the chunk's start.
    weights = _power(log_g, offset + 1 if REVERSE else CHUNK - 1 - offset)
    total = tl.zeros((RANK, D), tl.float32)
    chunks = tl.cdiv(length, CHUNK)
    for step in range(chunks):
        positions = (chunks - 1 - step if REVERSE else step) * CHUNK + offset
        key = _load(keys + start * r, positions, length, ranks, r, r) * weights
        value = _load(values + start * d, positions, length, columns, d, d)
        total = tl.dot(tl.trans(key), value, total * whole, input_precision=PRECISION)
    at_edge = slot == (segments - 2 if REVERSE else 0)
    total += tl.exp(log_g * length)[:, None] * _load_edge(edge, at_edge, batch, ranks, columns, r, d)
    _store(interior + (batch * (segments - 1) + slot) * (r * d), total, ranks, r, columns, d, d)


@triton.jit(do_not_specialize=["slots"])
def scan_segments(
    interior, log_decay, slots,
    r: tl.constexpr, d: tl.constexpr, LENGTH: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    REVERSE: tl.constexpr,
):  # fmt: skip
    """From each segment's own update to the state at each boundary, in place: x_s += g^LENGTH x_(s-1)."""
    # A program owns one rank of one row of the batch. GROUP slots are one matrix product with the powers of
    # the decay: their loads overlap, where a step-by-step scan would wait for memory once a slot.
    tiles: tl.constexpr = (d + D - 1) // D
    program = tl.program_id(0)
    columns = (program % tiles) * D + tl.arange(0, D)
    rank = (program // tiles) % r
    batch = (program // tiles // r).to(tl.int64)
    base = interior + batch * slots * (r * d) + rank * d + columns[None, :]
    step = tl.load(log_decay + rank) * LENGTH
    offset = tl.arange(0, GROUP)
    lag = offset[:, None] - offset[None, :]
    weights = tl.where(lag >= 0, tl.exp(step * tl.maximum(lag, 0)), 0.0)
    from_before = tl.exp(step * (offset + 1))[:, None]
    carry = tl.zeros((D,), tl.float32)
    for first in range(0, slots, GROUP):
        order = first + offset
        slot = (slots - 1 - order if REVERSE else order).to(tl.int64)
        mask = (order[:, None] < slots) & (columns[None, :] < d)
        pointers = base + slot[:, None] * (r * d)
        updates = tl.load(pointers, mask=mask, other=0.0)
        # The state is float32 whatever the inputs are: never less than three products here.
        states = tl.dot(weights, updates, from_before * carry[None, :], input_precision="tf32x3")
        tl.store(pointers, states, mask=mask)
        carry = tl.sum(tl.where((offset == GROUP - 1)[:, None], states, 0.0), 0)


@triton.jit(do_not_specialize=["t", "segments"])
def outputs(
    queries, keys, values, log_decay, state, interior, y, final, t, segments,
    r: tl.constexpr, d: tl.constexpr, LENGTH: tl.constexpr, CHUNK: tl.constexpr, RANK: tl.constexpr,
    D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y, and the state after the last position."""
    batch, segment, start, length, _, columns = _place(t, segments, d, LENGTH, D)
    offset = tl.arange(0, CHUNK)
    ranks = tl.arange(0, RANK)
    log_g = _load_log_decay(log_decay, ranks, r)
    carried = _load_boundary(state, interior, segment == 0, batch, segments - 1, segment - 1, ranks, columns, r, d)
    causal = offset[:, None] >= offset[None, :]
    to_middle = _power(log_g, offset - (CHUNK - 1) / 2)
    from_middle = _power(log_g, (CHUNK - 1) / 2 - offset)
    from_start = _power(log_g, offset + 1)
    for first in range(0, length, CHUNK):
        positions = first + offset
        count = tl.minimum(length - first, CHUNK)
        query = _load(queries + start * r, positions, length, ranks, r, r)
        key = _load(keys + start * r, positions, length, ranks, r, r)
        value = _load(values + start * d, positions, length, columns, d, d)
        # The triangle that is dropped may hold inf: select, never multiply.
        scores = tl.dot(query * to_middle, tl.trans(key * from_middle), input_precision=PRECISION)
        scores = tl.where(causal, scores, 0.0)
        result = tl.dot(query * from_start, carried, input_precision=PRECISION)
        result = tl.dot(scores, value, result, input_precision=PRECISION)
        _store(y + start * d, result, positions, length, columns, d, d)
        to_end = _power(log_g, tl.maximum(count - 1 - offset, 0))
        whole = tl.exp(log_g * count)[:, None]
        carried = tl.dot(tl.trans(key * to_end), value, carried * whole, input_precision=PRECISION)
    _store_edge(final, carried, segment == segments - 1, batch, ranks, columns, r, d)


@triton.jit(do_not_specialize=["t", "segments"])
def query_gradients(
    queries, keys, values, log_decay, state, interior, dy, dfinal, dinterior, dq, dlog_decay, t, segments,
    r: tl.constexpr, d: tl.constexpr, LENGTH: tl.constexpr, CHUNK: tl.constexpr, RANK: tl.constexpr,
    D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """This tile's part of dq, and of the gradient of the log decays but for the lags that end a key's chunk.

    A term that carries g to the power of its lag has the lag times itself as its derivative by log g. Lags are
    summed from non-negative pieces (key to the end of its chunk, whole chunks, start of a chunk to query), so
    nothing cancels, at any precision of the products. `lagged` is the state with each of its terms multiplied
    by the positions of the whole chunks that it has crossed since the segment began.
    """
    batch, segment, start, length, tile, columns = _place(t, segments, d, LENGTH, D)
    tiles: tl.constexpr = (d + D - 1) // D
    offset = tl.arange(0, CHUNK)
    ranks = tl.arange(0, RANK)
    log_g = _load_log_decay(log_decay, ranks, r)
    carried = _load_boundary(state, interior, segment == 0, batch, segments - 1, segment - 1, ranks, columns, r, d)
    lagged = tl.zeros((RANK, D), tl.float32)
    by_decay = tl.zeros((RANK,), tl.float32)
    lag = offset[:, None] - offset[None, :]
    to_middle = _power(log_g, offset - (CHUNK - 1) / 2)
    from_middle = _power(log_g, (CHUNK - 1) / 2 - offset)
    from_start = _power(log_g, offset + 1)
    for first in range(0, length, CHUNK):
        positions = first + offset
        count = tl.minimum(length - first, CHUNK)
        query = _load(queries + start * r, positions, length, ranks, r, r)
        key = _load(keys + start * r, positions, length, ranks, r, r)
        value = _load(values + start * d, positions, length, columns, d, d)
        gradient = _load(dy + start * d, positions, length, columns, d, d)
        dscores = tl.dot(gradient, tl.trans(value), input_precision=PRECISION)
        dscores = tl.where(lag >= 0, dscores, 0.0)
        scaled_key = key * from_middle
        inner = tl.dot(dscores, scaled_key, input_precision=PRECISION) * to_middle
        inner_by_decay = tl.dot(dscores * lag, scaled_key, input_precision=PRECISION) * to_middle
        outer = tl.dot(gradient, tl.trans(carried), input_precision=PRECISION) * from_start
        outer_by_decay = tl.dot(gradient, tl.trans(lagged), input_precision=PRECISION) * from_start
        outer_by_decay += (offset + 1)[:, None] * outer
        by_decay += tl.sum(query * (inner_by_decay + outer_by_decay), 0)
        _store(dq + (start * tiles + tile) * r, inner + outer, positions, length, ranks, r, tiles * r)
        to_end = _power(log_g, tl.maximum(count - 1 - offset, 0))
        whole = tl.exp(log_g * count)[:, None]
        lagged = whole * (lagged + count * carried)
        carried = tl.dot(tl.trans(key * to_end), value, carried * whole, input_precision=PRECISION)
    ends = _load_boundary(
        dfinal, dinterior, segment == segments - 1, batch, segments - 1, segment, ranks, columns, r, d
    )
    by_decay += tl.sum(lagged * ends, 1)
    tl.store(dlog_decay + tl.program_id(0).to(tl.int64) * r + ranks, by_decay, mask=ranks < r)


@triton.jit(do_not_specialize=["t", "segments"])
def key_value_gradients(
    queries, keys, values, log_decay, dy, dfinal, dinterior, dk, dv, dlog_decay, dstate, t, segments,
    r: tl.constexpr, d: tl.constexpr, LENGTH: tl.constexpr, CHUNK: tl.constexpr, RANK: tl.constexpr,
    D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dv, dstate, this tile's part of dk, and of the gradient of the log decays for lags that end a key's chunk."""
    batch, segment, start, length, tile, columns = _place(t, segments, d, LENGTH, D)
    tiles: tl.constexpr = (d + D - 1) // D
    offset = tl.arange(0, CHUNK)
    ranks = tl.arange(0, RANK)
    log_g = _load_log_decay(log_decay, ranks, r)
    carried = _load_boundary(
        dfinal, dinterior, segment == segments - 1, batch, segments - 1, segment, ranks, columns, r, d
    )
    by_decay = tl.zeros((RANK,), tl.float32)
    # Keys are rows here and queries columns.
    causal = offset[:, None] <= offset[None, :]
    to_middle = _power(log_g, offset - (CHUNK - 1) / 2)
    from_middle = _power(log_g, (CHUNK - 1) / 2 - offset)
    from_start = _power(log_g, offset + 1)
    chunks = tl.cdiv(length, CHUNK)
    for step in range(chunks):
        first = (chunks - 1 - step) * CHUNK
        positions = first + offset
        count = tl.minimum(length - first, CHUNK)
        query = _load(queries + start * r, positions, length, ranks, r, r)
        key = _load(keys + start * r, positions, length, ranks, r, r)
        value = _load(values + start * d, positions, length, columns, d, d)
        gradient = _load(dy + start * d, positions, length, columns, d, d)
        scaled_query = query * to_middle
        scores = tl.dot(key * from_middle, tl.trans(scaled_query), input_precision=PRECISION)
        scores = tl.where(causal, scores, 0.0)
        dscores = tl.dot(value, tl.trans(gradient), input_precision=PRECISION)
        dscores = tl.where(causal, dscores, 0.0)
        offsets_to_end = tl.maximum(count - 1 - offset, 0)
        to_end = _power(log_g, offsets_to_end)
        result = tl.dot(key * to_end, carried, input_precision=PRECISION)
        result = tl.dot(scores, gradient, result, input_precision=PRECISION)
        _store(dv + start * d, result, positions, length, columns, d, d)
        inner = tl.dot(dscores, scaled_query, input_precision=PRECISION) * from_middle
        outer = tl.dot(value, tl.trans(carried), input_precision=PRECISION) * to_end
        by_decay += tl.sum(offsets_to_end[:, None] * key * outer, 0)
        _store(dk + (start * tiles + tile) * r, inner + outer, positions, length, ranks, r, tiles * r)
        whole = tl.exp(log_g * count)[:, None]
        carried = tl.dot(tl.trans(query * from_start), gradient, carried * whole, input_precision=PRECISION)
    _store_edge(dstate, carried, segment == 0, batch, ranks, columns, r, d)
    tl.store(dlog_decay + tl.program_id(0).to(tl.int64) * r + ranks, by_decay, mask=ranks < r)
