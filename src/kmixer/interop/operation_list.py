"""The operations of a prepared decoding step as data, for readers in other languages.

    listed = operation_list(model)
    json.dumps(listed.description)    the operations in their order, and where their arrays lie in `listed.arrays`

    {"vocabulary": 65, "memory": 2048, "buffers": [64, ...], "logits": 6, "operations": [
        {"kind": "linear", "input": 1, "output": 2, "inputs": 64, "outputs": 128, "activation": "gelu", "residual": -1,
         "arrays": {"weight": {"at": 16640, "count": 8320, "half": false}}, ...}, ...]}

An operation reads row `input` and writes row `output` of numbered buffers. What it does, and how its arrays lie, says
native/decode_state.h; `page/step.js` is a reader in JavaScript. Arrays are little-endian, 32 bits a number, or 16 where
`half` is true; `at` is in bytes.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch

from kmixer.errors import InputError
from kmixer.generation import operations as op
from kmixer.generation.model_operations import model_program
from kmixer.generation.operations import Operation
from kmixer.generation.panels import PANEL, RANK_MULTIPLE, whole
from kmixer.generation.prepared import why_no_operations
from kmixer.layers.copy_memory import BUCKETS
from kmixer.models.causal_lm import CausalLM
from kmixer.ops.pointwise_norm import KINDS as POINTWISE_KINDS

KINDS = {
    op.EMBED: "embed",
    op.LINEAR: "linear",
    op.NORM: "norm",
    op.MIX: "mix",
    op.READ_OUT: "read_out",
    op.REFINE: "refine",
    op.REMEMBER: "remember",
    op.COPY: "copy",
    op.POINT: "point",
    op.POINTWISE: "pointwise",
}
UNDESCRIBED = {
    op.ADAPT: "fast weights",
    op.ATTEND: "attention",
    op.WEIGH: "blocks of kind nanochat",
    op.CAP: "a soft cap on its logits",
}
ACTIVATIONS = {op.NONE: "none", op.GELU: "gelu", op.GATE: "gate"}
FUNCTIONS = {number: function for function, number in POINTWISE_KINDS.items()}  # of pointwise operations
# The only arrays that may have 16 bits: a decay near 1 does not bear it.
TABLES = {op.EMBED, op.LINEAR, op.REMEMBER}


@dataclass(frozen=True)
class OperationList:
    """What a reader needs: a description for JSON, and the bytes it points into."""

    description: dict[str, Any]
    arrays: bytes


def operation_list(model: CausalLM, *, half: bool = False) -> OperationList:
    """The operations of one step of a model, and their arrays.

    Args:
        model: in evaluation mode, on a CPU, in float32.
        half: 16 bits for the numbers of tables and matrices.

    Raises InputError for a model without such a list: attention, a base kernel that ends, a part that is not known.
    """
    if problem := why_no_operations(model):
        raise InputError(f"this model has no list of operations: {problem}")
    program = model_program(model)
    undescribed = next((UNDESCRIBED[one.kind] for one in program.list if one.kind in UNDESCRIBED), None)
    if undescribed is not None:
        raise InputError(f"this model has {undescribed}, which a list of operations does not describe")
    listed, arrays = [], bytearray()
    for one in program.list:
        described: dict[str, Any] = {
            "kind": KINDS[one.kind],
            **{name: getattr(one, name) for name in ("input", "output", "inputs", "outputs", "residual")},
            **{name: getattr(one, name) for name in ("rank", "lags", "queries", "eps")},
            "activation": (FUNCTIONS if one.kind == op.POINTWISE else ACTIVATIONS)[one.activation],
            "wide_rank": whole(one.rank, RANK_MULTIPLE),
            "arrays": {},
        }
        for name, count in _counts(one, model.vocabulary_size).items():
            numbers = (ctypes.c_float * count).from_address(getattr(one, name))
            short = half and name == "weight" and one.kind in TABLES
            tensor = torch.frombuffer(numbers, dtype=torch.float32)
            content = tensor.to(torch.float16 if short else torch.float32).numpy().tobytes()
            described["arrays"][name] = {"at": len(arrays), "count": count, "half": short}
            arrays += content + bytes(-len(content) % 4)
        listed.append(described)
    return OperationList(
        {
            "vocabulary": model.vocabulary_size,
            "memory": None if model.copy_memory is None else model.copy_memory.memory,
            "buffers": program.widths,
            "logits": program.logits,
            "operations": listed,
        },
        bytes(arrays),
    )


def _counts(one: Operation, vocabulary: int) -> dict[str, int]:
    """How many numbers the arrays of an operation have, of those that are there."""
    wide, rank = whole(one.inputs, PANEL), whole(one.rank, RANK_MULTIPLE)
    buckets = one.rank + 1
    counts = {
        op.EMBED: {"weight": vocabulary * one.inputs},
        op.LINEAR: {"weight": (one.inputs + 1) * whole(one.outputs, PANEL)},
        op.NORM: {"weight": wide},
        op.MIX: {"weight": rank, "bias": rank, "extra": one.lags},
        op.READ_OUT: {"weight": wide, "bias": wide, "extra": wide},
        op.POINTWISE: {"weight": wide, "bias": wide, "extra": 2},
        op.REFINE: {"extra": 1},
        op.REMEMBER: {"weight": (vocabulary + 1) * one.inputs, "bias": buckets * one.inputs, "extra": one.rank},
        op.COPY: {"weight": BUCKETS},
        op.POINT: {"weight": one.inputs, "bias": BUCKETS},
    }[one.kind]
    return {name: count for name, count in counts.items() if getattr(one, name) is not None}
