"""Decayed linear attention: the recurrent path of a K2 layer.

    S_t = diag(g) S_{t-1} + k_t^T v_t        S (r, d), g = exp(log_decay) in (0, 1]^r
    y_t = q_t S_t

* `recurrent` runs these two lines as they stand. It is the definition.
* `mask` weights every pair of positions, as in the K-Operators preprints: quadratic in t, and the
  only backend that holds a (b, t, r, d) tensor. Kept as a baseline.
* `block` works on chunks of c positions with matrix products, and carries the state between chunks.
* `native` runs the recurrence compiled, its state in the processor's cache; float32, on a CPU.
* `triton` does the same in kernels for a GPU (`decay_triton`); triton is imported when it is used.

Source: Koneko 2026 (Zenodo 19136398), decay path; the chunked form uses that g does not depend on t.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from kmixer import native
from kmixer.errors import InputError
from kmixer.ops.decay_native import native_decay
from kmixer.ops.gradients import first_order

Backend = Literal["auto", "recurrent", "mask", "block", "native", "triton"]
BACKENDS: tuple[str, ...] = get_args(Backend)

# More rows a chunk cost more in the (c, c) product than they save in chunk states.
MAX_CHUNK = 32
# The scaled queries and keys reach g^-(c-1)/2. exp(48) leaves 40 nats to either end of float32's
# range for the inputs themselves, and admits every g >= 0.05 at c = 32.
MAX_EXPONENT = 48.0
# Looked up, not imported: `import kmixer` needs torch alone.
TRITON_INSTALLED = find_spec("triton") is not None
TRITON_MAX_RANK = 128


def decayed_linear_attention(
    q: Float[Tensor, "b t r"],
    k: Float[Tensor, "b t r"],
    v: Float[Tensor, "b t d"],
    log_decay: Float[Tensor, " r"],
    *,
    state: Float[Tensor, "b r d"] | None = None,
    backend: Backend = "auto",
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b r d"]]:
    """Mix v over time: y_t = q_t S_t with S_t = diag(exp(log_decay)) S_{t-1} + k_t^T v_t.

    Any split of a sequence gives the result of the whole: pass the returned state on as `state`.

    Args:
        q, k: queries and keys (b, t, r).
        v: values (b, t, d).
        log_decay: natural logarithm of the decays (r,), each in (-inf, 0], which is not checked: sums of a decay
            above 1 overflow.
        state: S before the first position (b, r, d); zeros when None.
        backend: "auto" takes `recurrent` for a single position, `triton` for tensors on an NVIDIA GPU where
            triton is installed (r up to 128, not float64), `native` on a CPU where it can run, and
            `block` otherwise.

    Returns:
        y (b, t, d) in the dtype of v, and the state after the last position (b, r, d).
        States and sums are float64 for float64 values and float32 for every other dtype.

    Raises:
        InputError: shapes that do not fit each other, or a backend that does not exist or cannot run here.

    Source: Koneko 2026 (Zenodo 19004569 and 19136398), low-rank recurrence of K2.
    """
    _check_shapes(q, k, v, log_decay, state)
    if backend not in BACKENDS:
        raise InputError(f"backend: got {backend!r}; allowed: {', '.join(BACKENDS)}")
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    b, t, d = v.shape
    if state is None:
        state = v.new_zeros(b, q.shape[-1], d, dtype=dtype)
    if t == 0:
        return v, state.to(dtype)
    if backend == "auto":
        backend = _automatic_backend(q, k, v)
    if backend == "triton":
        return _triton(q, k, v, log_decay, state)
    if backend == "native" and not (dtype == torch.float32 and native.available(q, k, v)):
        raise InputError(
            "backend 'native' needs float32 or smaller inputs on a CPU and the compiled kernels, which "
            "are built at installation where there is a C++ compiler; backend 'block' runs everywhere"
        )
    run = _IMPLEMENTATIONS[backend]
    with torch.autocast(v.device.type, enabled=False):
        y, state = run(q.to(dtype), k.to(dtype), v.to(dtype), log_decay.to(dtype), state.to(dtype))
    return y.to(v.dtype), state


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None) -> None:
    given = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, log_decay {tuple(log_decay.shape)}"
    if q.ndim != 3 or q.shape != k.shape or v.ndim != 3 or q.shape[:2] != v.shape[:2] or log_decay.shape != q.shape[2:]:
        raise InputError(f"decayed_linear_attention needs q, k (b, t, r), v (b, t, d), log_decay (r,); got {given}")
    expected = (v.shape[0], q.shape[2], v.shape[2])
    if state is not None and tuple(state.shape) != expected:
        raise InputError(f"decayed_linear_attention needs a state (b, r, d) = {expected}; got {tuple(state.shape)}")


def _automatic_backend(q: Tensor, k: Tensor, v: Tensor) -> Backend:
    if v.shape[1] == 1:
        return "recurrent"
    if torch.float64 in (q.dtype, k.dtype, v.dtype):
        return "block"
    if native.available(q, k, v):
        return "native"
    # The kernels take TF32 products, which AMD's cards, "cuda" to torch as well, do not all have.
    nvidia = v.is_cuda and torch.version.hip is None
    return "triton" if nvidia and TRITON_INSTALLED and q.shape[-1] <= TRITON_MAX_RANK else "block"


def _triton(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    if not TRITON_INSTALLED:
        raise InputError("backend 'triton' needs the package triton: install kmixer[gpu]")
    from kmixer.ops.decay_triton import triton_decay

    return triton_decay(q, k, v, log_decay, state)


def _recurrent(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    decay = log_decay.exp()[:, None]
    outputs = []
    for q_t, k_t, v_t in zip(q.unbind(1), k.unbind(1), v.unbind(1), strict=True):
        state = decay * state + k_t[:, :, None] * v_t[:, None, :]
        outputs.append((q_t[:, None, :] @ state).squeeze(1))
    return torch.stack(outputs, dim=1), state


def _mask(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    t = q.shape[1]
    position = torch.arange(t, device=q.device)
    lag = position[:, None] - position[None, :]
    weight = torch.exp(log_decay * lag.clamp(min=0)[:, :, None]) * (lag >= 0)[:, :, None]
    outer = k[:, :, :, None] * v[:, :, None, :]
    carried = torch.exp(log_decay * (position + 1)[:, None])[:, :, None] * state[:, None]
    states = torch.einsum("ijr,bjrd->bird", weight, outer) + carried
    return torch.einsum("bir,bird->bid", q, states), states[:, -1]


def _block(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    t = q.shape[1]
    chunk = _chunk_length(log_decay)
    outputs = []
    for start, stop, length in ((0, t - t % chunk, chunk), (t - t % chunk, t, t % chunk)):
        if start < stop:
            part = slice(start, stop)
            y, state = _Chunked.apply(q[:, part], k[:, part], v[:, part], log_decay, state, length)
            outputs.append(y)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1), state


def _chunk_length(log_decay: Tensor) -> int:
    """The longest power of two up to MAX_CHUNK whose scaling exponents stay within MAX_EXPONENT."""
    steepest = -float(log_decay.detach().min())
    chunk = MAX_CHUNK
    while chunk > 1 and steepest * (chunk - 1) / 2 > MAX_EXPONENT:
        chunk //= 2
    return chunk


class _Chunked(torch.autograd.Function):
    """The chunked form for t divisible by the chunk length c, with its backward written by hand.

    Inside a chunk, A_ij = sum_r q_i k_j g^(i-j) for j <= i is one matrix product of q g^(i-m) and
    k g^(m-j): the midpoint m halves the largest exponent. What the backward needs beyond the
    inputs are the n = t / c states at chunk starts; everything else is computed again.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, c: int) -> Any:
        shape = v.shape
        q, k, v = _into_chunks(c, q, k, v)
        table = _Scales(log_decay, c)
        updates = (k * table.key_to_end).mT @ v
        starts, final = _scan(updates.unflatten(0, (shape[0], -1)), state, table.whole)
        scores = _scores(q, k, table)
        y = torch.baddbmm(scores @ v, q * table.start_to_query, starts.flatten(0, 1))
        ctx.save_for_backward(q, k, v, log_decay, starts)
        ctx.chunk = c
        return y.view(shape), final

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor) -> Any:
        q, k, v, log_decay, starts = ctx.saved_tensors
        b, n = starts.shape[:2]
        c = ctx.chunk
        table = _Scales(log_decay, c)
        (dy,) = _into_chunks(c, dy)

        updates = (q * table.start_to_query).mT @ dy
        ends, dstate = _scan(updates.unflatten(0, (b, n)).flip(1), dfinal, table.whole)
        ends = ends.flip(1).flatten(0, 1)  # gradient of the state after each chunk
        flat_starts = starts.flatten(0, 1)

        dv = torch.baddbmm(_scores(q, k, table).mT @ dy, k * table.key_to_end, ends)
        dscores = (dy @ v.mT).tril_()
        dq_inner = (dscores @ (k * table.middle_to_key)) * table.query_to_middle
        dk_inner = (dscores.mT @ (q * table.query_to_middle)) * table.middle_to_key
        dq_outer = (dy @ flat_starts.mT) * table.start_to_query
        dk_outer = (v @ ends.mT) * table.key_to_end

        dlog_decay = None
        if ctx.needs_input_grad[3]:
            # Every term carries g to the power of its lag, so d/dlog g multiplies it by the lag.
            # Lags are taken inside a chunk: sums over global positions would cancel to nothing.
            place = table.position
            inner = (place * (q * dq_inner - k * dk_inner).sum(0)).sum(0)
            outer = ((place + 1) * (q * dq_outer).sum(0) + (c - 1 - place) * (k * dk_outer).sum(0)).sum(0)
            carried = c * table.whole[:, 0] * (flat_starts * ends).sum((0, 2))
            dlog_decay = inner + outer + carried

        def merged(x: Tensor) -> Tensor:
            return x.reshape(b, n * c, -1)

        return merged(dq_inner + dq_outer), merged(dk_inner + dk_outer), merged(dv), dlog_decay, dstate, None


class _Scales:
    """Powers of the decays inside a chunk of c positions, each (c, r); `whole` is g^c (r, 1)."""

    def __init__(self, log_decay: Tensor, c: int) -> None:
        position = torch.arange(c, device=log_decay.device, dtype=log_decay.dtype)[:, None]
        middle = (c - 1) / 2
        self.position = position
        self.query_to_middle = torch.exp(log_decay * (position - middle))
        self.middle_to_key = torch.exp(log_decay * (middle - position))
        self.start_to_query = torch.exp(log_decay * (position + 1))
        self.key_to_end = torch.exp(log_decay * (c - 1 - position))
        self.whole = torch.exp(log_decay * c)[:, None]


def _scores(q: Tensor, k: Tensor, table: _Scales) -> Tensor:
    # The discarded triangle may overflow; tril drops it without reading it.
    return ((q * table.query_to_middle) @ (k * table.middle_to_key).mT).tril_()


def _scan(updates: Tensor, state: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
    """State before each of n chunks (b, n, r, d), and after the last (b, r, d)."""
    before = torch.empty_like(updates)
    for i, update in enumerate(updates.unbind(1)):
        before[:, i] = state
        state = torch.addcmul(update, state, decay)
    return before, state


def _into_chunks(c: int, *tensors: Tensor) -> list[Tensor]:
    return [x.reshape(-1, c, x.shape[-1]) for x in tensors]


_IMPLEMENTATIONS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "recurrent": _recurrent,
    "mask": _mask,
    "block": _block,
    "native": native_decay,
}
