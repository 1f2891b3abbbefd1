"""Decayed linear attention: the recurrent path of a K2 layer.

    S_t = diag(g) S_{t-1} + k_t^T v_t        S (r, d), g = exp(log_decay) in (0, 1]^r
    y_t = q_t S_t

* `recurrent` runs these two lines as they stand. It is the definition.
* `mask` weights every pair of positions, as in the K-Operators preprints: quadratic in t, and the
  only backend that holds a (b, t, r, d) tensor. Kept as a baseline.
* `block` works on chunks of positions with matrix products, and carries the state between chunks (block.py).
* `native` runs the recurrence compiled, its state in the processor's cache; float32, on a CPU (native.py).
* `triton` does the same in kernels for a GPU (launch.py); triton is imported when it is used.

Source: Koneko 2026 (Zenodo 19136398), decay path; the chunked form uses that g does not depend on t.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from kmixer import native
from kmixer.errors import InputError
from kmixer.native.dispatch import ELEMENTS
from kmixer.ops.checks import FLOATS, check_tensors
from kmixer.ops.decay.block import block_decay
from kmixer.ops.decay.native import native_decay
from kmixer.ops.decay.operator import LEAST_LOG_DECAY, TRITON_MAX_RANK
from kmixer.ops.gradients import refuse_transforms

Backend = Literal["auto", "recurrent", "mask", "block", "native", "triton"]
BACKENDS: tuple[str, ...] = get_args(Backend)

# Looked up, not imported: `import kmixer` needs torch alone.
TRITON_INSTALLED = find_spec("triton") is not None


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
        log_decay: natural logarithm of the decays (r,), each in [-inf, 0]: sums of a decay above 1 would overflow.
            Checked for tensors on a CPU; on a GPU that would wait for it, and in torch.compile and torch.func nothing
            can be read: there a decay above 1 gives what the backend makes of it.
        state: S before the first position (b, r, d); zeros when None.
        backend: "auto" takes `recurrent` for a single position, `triton` for tensors on an NVIDIA GPU where
            triton is installed (r up to 128, not float64), `native` on a CPU where it can run, and
            `block` otherwise. Inside torch.func (grad, vmap, jvp) and forward mode it takes `recurrent`.

    q, k, v, log_decay and state are float64, float32, bfloat16 or float16, on one device. b, t, r and d may be 0.

    Returns:
        y (b, t, d) in the dtype of v, and the state after the last position (b, r, d).
        States and sums are float64 for float64 values and float32 for every other dtype.

    Raises:
        InputError: shapes, devices or dtypes that do not fit, log decays above 0 or NaN, a backend that does not exist
            or cannot run here, or, but for `recurrent` and `mask`, which have those: second derivatives, torch.func,
            and forward mode.

    Source: Koneko 2026 (Zenodo 19004569 and 19136398), low-rank recurrence of K2.
    """
    _check_shapes(q, k, v, log_decay, state)
    check_tensors("decayed_linear_attention", q=q, k=k, v=v, log_decay=log_decay, state=state)
    _check_range(log_decay)
    if backend not in BACKENDS:
        raise InputError(f"backend: got {backend!r}; allowed: {', '.join(BACKENDS)}")
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    b, t, d = v.shape
    if state is None:
        state = v.new_zeros(b, q.shape[-1], d, dtype=dtype)
    if backend == "auto":
        backend = _automatic_backend(q, k, v, log_decay, state)
    if backend not in ("recurrent", "mask"):
        refuse_transforms(f"backend {backend!r}", q, k, v, log_decay, state)
    if t == 0:
        return v, state.to(dtype)
    if backend == "native" and not (dtype == torch.float32 and native.usable(q, k, v, dtypes=FLOATS, operator=True)):
        raise InputError(
            "backend 'native' needs float32 or smaller inputs on a CPU and the compiled kernels, which "
            "are built at installation where there is a C++ compiler; backend 'block' runs everywhere"
        )
    if 0 in (b, q.shape[-1], d):
        backend = "recurrent"  # nothing to compute: there is no faster form of it
    elif backend == "triton":
        return _triton(q, k, v, log_decay, state)
    run = _IMPLEMENTATIONS[backend]
    values = v if backend == "native" and v.dtype in ELEMENTS else v.to(dtype)
    with torch.autocast(v.device.type, enabled=False):
        y, state = run(q.to(dtype), k.to(dtype), values, log_decay.to(dtype), state.to(dtype))
    return y.to(v.dtype), state


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None) -> None:
    given = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, log_decay {tuple(log_decay.shape)}"
    if q.ndim != 3 or q.shape != k.shape or v.ndim != 3 or q.shape[:2] != v.shape[:2] or log_decay.shape != q.shape[2:]:
        raise InputError(f"decayed_linear_attention needs q, k (b, t, r), v (b, t, d), log_decay (r,); got {given}")
    expected = (v.shape[0], q.shape[2], v.shape[2])
    if state is not None and tuple(state.shape) != expected:
        raise InputError(f"decayed_linear_attention needs a state (b, r, d) = {expected}; got {tuple(state.shape)}")


def _check_range(log_decay: Tensor) -> None:
    if log_decay.numel() and native.plain(log_decay):
        highest = float(log_decay.detach().max())  # NaN where any is
        if not highest <= 0:
            raise InputError(
                f"decayed_linear_attention: got a log_decay of {highest:.4g}; allowed: [-inf, 0], decays from 0 to 1"
            )


def _automatic_backend(q: Tensor, k: Tensor, v: Tensor, *others: Tensor) -> Backend:
    if v.shape[1] == 1 or native.transformed(q, k, v, *others):
        return "recurrent"
    if torch.float64 in (q.dtype, k.dtype, v.dtype):
        return "block"
    if native.usable(q, k, v, dtypes=FLOATS, operator=True):
        return "native"
    # The kernels take TF32 products, which AMD's cards, "cuda" to torch as well, do not all have.
    nvidia = v.is_cuda and torch.version.hip is None
    return "triton" if nvidia and TRITON_INSTALLED and q.shape[-1] <= TRITON_MAX_RANK else "block"


def _triton(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    if not TRITON_INSTALLED:
        raise InputError("backend 'triton' needs the package triton: install kmixer[gpu]")
    from kmixer.ops.decay.launch import triton_decay

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
    log_decay = log_decay.clamp(min=LEAST_LOG_DECAY)
    weight = torch.exp(log_decay * lag.clamp(min=0)[:, :, None]) * (lag >= 0)[:, :, None]
    outer = k[:, :, :, None] * v[:, :, None, :]
    carried = torch.exp(log_decay * (position + 1)[:, None])[:, :, None] * state[:, None]
    states = torch.einsum("ijr,bjrd->bird", weight, outer) + carried
    return torch.einsum("bir,bird->bid", q, states), states[:, -1]


_IMPLEMENTATIONS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "recurrent": _recurrent,
    "mask": _mask,
    "block": block_decay,
    "native": native_decay,
}
