"""Structures that kernels take where they have more arguments than a reader can count; their sizes are checked."""

from __future__ import annotations

import ctypes

Addresses = ctypes.POINTER(ctypes.c_void_p)


class Attention(ctypes.Structure):
    """`Attention` in native/hierarchical.h."""

    _fields_ = (
        *((name, Addresses) for name in ("queries", "keys")),
        *((name, ctypes.c_void_p) for name in ("values", "weights", "y", "highest", "sums")),
        *((name, ctypes.c_int64) for name in ("n", "heads", "t", "levels", "e", "f", "causal")),
        ("scale", ctypes.c_float),
        ("unused", ctypes.c_float),
    )


class AttentionGradients(ctypes.Structure):
    """`AttentionGradients` in native/hierarchical.h."""

    _fields_ = (
        ("y", ctypes.c_void_p),
        *((name, Addresses) for name in ("queries", "keys")),
        *((name, ctypes.c_void_p) for name in ("values", "weights")),
    )


# By the C function that returns the size.
SIZES: dict[str, type[ctypes.Structure]] = {
    "attention_size": Attention,
    "attention_gradients_size": AttentionGradients,
}
