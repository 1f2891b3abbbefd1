"""The operations of a prepared decoding step, as native/decode.cpp runs them, and the program that they are put into.

Every operation reads and writes rows of numbered buffers. Weights are folded while the program is made: tables with the
projections behind them, gates and decays with their sigmoids.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from kmixer.errors import InputError
from kmixer.generation.live import Live
from kmixer.generation.panels import PRECISIONS, padded, panels, whole
from kmixer.layers import BaseKernel
from kmixer.layers.linear import Linear
from kmixer.layers.norms import NORM_EPS, Derf, DyT, UnweightedRMSNorm
from kmixer.models.causal_lm import DecodedIn
from kmixer.ops.pointwise_norm import KINDS, Pointwise

LINE = 16
(EMBED, LINEAR, NORM, MIX, READ_OUT, REFINE, REMEMBER, COPY, POINT, ADAPT, POINTWISE, ATTEND, WEIGH, CAP) = range(14)
NONE, GELU, GATE, SQUARED_RELU = range(4)


class Operation(ctypes.Structure):
    """`Operation` in native/decode_state.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("kind", "input", "output", "inputs", "outputs")),
        *((name, ctypes.c_int64) for name in ("activation", "residual")),
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "extra", "state", "keys")),
        *((name, ctypes.c_int64) for name in ("rank", "lags", "queries", "span")),
        *((name, ctypes.c_void_p) for name in ("automata", "matches")),
        ("words", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("fast", "attention")),
        ("precision", ctypes.c_int64),
        ("eps", ctypes.c_float),
        ("unused", ctypes.c_float),
    )


class Decoding(ctypes.Structure):
    """`Decoding` in native/decode.cpp."""

    _fields_ = (
        ("operations", ctypes.POINTER(Operation)),
        ("count", ctypes.c_int64),
        ("buffers", ctypes.POINTER(ctypes.c_void_p)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("tokens", ctypes.POINTER(ctypes.c_int64)),
        *((name, ctypes.c_int64) for name in ("rows", "logits", "vocabulary")),
    )


class Place(NamedTuple):
    """What a stack hands to the layers that it calls.

    Buffers are -1 where there is nothing: `source` of what fast weights learn from, `vector` of what the rows copy,
    which goes through the `gates` of this layer. `table` (v, d) is that of value embeddings.
    """

    width: int
    source: int = -1
    vector: int = -1
    gates: Tensor | None = None
    shared_kernel: BaseKernel | None = None
    table: Tensor | None = None


class Mixed(NamedTuple):
    """What follows what was mixed: a gate on it, of the normed input, and the last matrix."""

    out: Linear
    gate: Linear | None = None


class Program:
    """Operations in their order, the buffers that they read and write, and what its layers carry.

    Args:
        precision: of the matrices of linear maps; with fewer bits, keys and values of attention have 16.
    """

    def __init__(self, precision: DecodedIn = "float32") -> None:
        self.precision: DecodedIn = precision
        self.list: list[Operation] = []
        self.widths: list[int] = []  # of the buffers
        self.live: list[Live] = []  # what layers carry, in the order of their states
        self.matching: list[int] = []  # which write or read what the rows copy, the one that remembers first
        self.logits = -1  # the number of their buffer
        self._scratch: dict[str, int] = {}
        self._tensors: dict[int, Tensor] = {}  # keeps alive what the operations point to, by its address

    @property
    def cache_dtype(self) -> torch.dtype:
        """In which keys and values are kept."""
        return torch.float32 if self.precision == "float32" else torch.bfloat16

    def strides(self) -> list[int]:
        """Of the rows of every buffer: whole panels, and one line of memory more, as rows a power of two apart share
        places in a cache; logits are given away as they are."""
        return [width if index == self.logits else whole(width) + LINE for index, width in enumerate(self.widths)]

    def finish(self) -> ctypes.Array[Operation]:
        """The operations one after the other, and so their weights, as they are read: the next are on their way
        before their turn."""
        linear = [operation for operation in self.list if operation.kind == LINEAR]
        matrices = [self._tensors.pop(operation.weight) for operation in linear]
        weights = torch.cat([matrix.view(torch.uint8).flatten() for matrix in matrices])
        at = weights.data_ptr()
        for operation, matrix in zip(linear, matrices, strict=True):
            operation.weight = at
            at += matrix.nbytes
        self._keep(weights)
        program = (Operation * len(self.list))(*self.list)
        for live in self.live:
            live.bind(program)
        return program

    def buffer(self, width: int) -> int:
        """A new one."""
        self.widths.append(width)
        return len(self.widths) - 1

    def scratch(self, name: str, width: int) -> int:
        """The buffer of this name, as wide as it was ever asked for: for what is used up before the next layer."""
        if name not in self._scratch:
            self._scratch[name] = self.buffer(0)
        number = self._scratch[name]
        self.widths[number] = max(self.widths[number], width)
        return number

    def norm(self, source: int, target: int, norm: nn.Module, width: int) -> None:
        if isinstance(norm, DyT | Derf):
            self.pointwise(source, target, norm.weights(), width)
        elif isinstance(norm, UnweightedRMSNorm):
            self.rms_norm(source, target, torch.ones(width))
        else:
            self.rms_norm(source, target, cast("Tensor", norm.weight))

    def pointwise(self, source: int, target: int, norm: Pointwise, width: int, residual: int = -1) -> None:
        if not norm.fits(width):
            raise InputError(f"the weights of this model do not fit each other: a norm on {width} channels")
        gain, bias, numbers = norm.packed(width).split([width, width, 2])
        wide = {name: padded(tensor, whole(width)) for name, tensor in (("weight", gain), ("bias", bias))}
        options = {"activation": KINDS[norm.function], "residual": residual}
        self.add(POINTWISE, source, target, inputs=width, extra=numbers, **wide, **options)

    def rms_norm(self, source: int, target: int, weight: Tensor) -> None:
        scale = padded(weight, whole(len(weight)))
        self.add(NORM, source, target, inputs=len(weight), weight=scale, eps=NORM_EPS)

    def linear(
        self,
        source: int,
        target: int,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        activation: int = NONE,
        residual: int = -1,
    ) -> None:
        outputs, inputs = weight.shape
        options = {"activation": activation, "residual": residual, "precision": PRECISIONS[self.precision]}
        packed = panels(weight, bias, self.precision)
        self.add(LINEAR, source, target, inputs=inputs, outputs=outputs, weight=packed, **options)

    def match(self, kind: int, source: int, target: int, **fields: Any) -> None:
        """One of the operations that know what the rows copy."""
        self.matching.append(len(self.list))
        self.add(kind, source, target, **fields)

    def add(self, kind: int, input: int = 0, output: int = 0, **fields: Any) -> None:
        inputs, written = fields["inputs"], fields.get("outputs", fields["inputs"])
        if written > self.widths[output] or (kind not in (EMBED, REMEMBER) and inputs > self.widths[input]):
            raise InputError(f"the weights of this model do not fit each other: {inputs} to {written} channels")
        for name, value in fields.items():
            if isinstance(value, Tensor):
                fields[name] = self._keep(value.detach().contiguous())
        self.list.append(Operation(kind=kind, input=input, output=output, **fields))

    def _keep(self, tensor: Tensor) -> int:
        """Where it lies, for as long as the operations are there."""
        self._tensors[tensor.data_ptr()] = tensor
        return tensor.data_ptr()
