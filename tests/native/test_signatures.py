"""The table of kernels is that of the C++ sources, and a call that does not fit it raises instead of running."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest
import torch

from kmixer import native
from kmixer.native import signatures, structures

pytestmark = pytest.mark.skipif(native.kernels() is None, reason="the compiled kernels were not built")

# What has a signature of its own: sizes of structures, the digest, and decoding, which prepares its arguments once.
APART = {
    "decode_commit",
    "decode_read",
    "decode_step",
    "decoding_attention_size",
    "decoding_size",
    "fast_weights_size",
    "operation_size",
    "sources_digest",
    "suffix_automaton_words",
    *structures.SIZES,
}
# The letters that a C++ argument may have.
LETTERS = {
    "const float*": "fFr", "float*": "fF", "double*": "d", "const double*": "d", "const int64_t*": "i",
    "const void*": "eE", "void*": "eE",
    "int64_t*": "i", "int32_t*": "j",
    "float* const*": "p", "int64_t": "n", "uint32_t": "u", "float": "x", "const Attention*": "A",
    "const AttentionGradients*": "G",
}  # fmt: skip


def functions() -> dict[str, list[str]]:
    """The types of the arguments of every C function of the sources, but for the number of threads, which ends them."""
    declared = {}
    for path in Path(native.__file__).parent.glob("*.cpp"):
        for block in path.read_text(encoding="utf-8").split('extern "C"')[1:]:
            for name, arguments in re.findall(r"^ ?(?:void|int64_t|const char\*) (\w+)\(([^)]*)\)", block, re.M):
                types = [re.sub(r"\s+", " ", x).strip() for x in arguments.split(",") if x.strip()]
                declared[name] = [re.sub(r" ?\w+$", "", x) for x in types]
    return declared


def test_the_table_is_that_of_the_sources() -> None:
    sources = functions()
    assert set(sources) - APART == set(signatures.SIGNATURES)
    for name, letters in signatures.SIGNATURES.items():
        types = sources[name]
        assert types.pop() == "int64_t"
        kinds = letters.replace(" ", "")
        if "e" in kinds:
            assert types.pop() == "int32_t"
        assert len(types) == len(kinds), name
        for kind, type_ in zip(kinds, types, strict=False):
            assert kind in LETTERS[type_], (name, type_, kind)


def gate(*changed: object) -> None:
    x = torch.ones(3, 4)
    arguments: list[object] = [x, x, torch.empty(3, 4), 3, 4]
    native.call("silu_gate_forward", *[*changed, *arguments[len(changed) :]])  # type: ignore[arg-type]


def test_calls_that_do_not_fit_raise() -> None:
    x = torch.ones(3, 4)
    gate()
    with pytest.raises(TypeError, match=r"silu_gate_forward: got 4 arguments; it takes 5"):
        native.call("silu_gate_forward", x, x, x, 3)
    with pytest.raises(TypeError, match=r"got 6 arguments"):
        native.call("silu_gate_forward", x, x, x, 3, 4, 5)
    for wrong, what in {
        "dtype": (x.double(), "torch.float64"),
        "layout": (torch.ones(4, 3).T, r"strides \(1, 3\)"),
        "device": (x.to("meta"), "on meta"),
        "number": (3, "got 3"),
        "None": (None, "got None"),
    }.values():
        with pytest.raises(TypeError, match=what):
            gate(wrong)
    with pytest.raises(TypeError, match="silu_gate_forward"):
        gate(x, x, x, 3.0)
    with pytest.raises(TypeError, match="silu_gate_forward"):
        gate(x, x, x, x)


def test_what_may_have_16_bits_has_them_in_all_arguments_of_a_call_or_in_none() -> None:
    x, y = torch.ones(3, 4), torch.empty(3, 4, dtype=torch.bfloat16)
    gate(x.bfloat16(), x.bfloat16(), y)
    assert torch.equal(y, (x * x.sigmoid()).bfloat16())
    for wrong in [(x.bfloat16(), x, y), (x, x, y), (x.bfloat16(), x.bfloat16(), x), (x.half(), x.half(), x.half())]:
        with pytest.raises(TypeError, match=r"takes a contiguous tensor of torch\.(bfloat16|float32)"):
            gate(*wrong)


def test_structures_hold_checked_addresses() -> None:
    with pytest.raises(TypeError, match=r"contiguous tensor of torch\.float32"):
        native.pointer(torch.ones(2, dtype=torch.float64))
    with pytest.raises(TypeError, match=r"contiguous tensor of torch\.float32"):
        native.addresses([torch.ones(2), torch.ones(4)[::2]])
    with pytest.raises(TypeError, match="hierarchical_forward"):
        native.call("hierarchical_forward", structures.AttentionGradients())
    with pytest.raises(TypeError, match=r"native\.addresses"):
        native.call("heads_apart", torch.ones(1), torch.ones(1), None, None, *[0] * 8)


@pytest.mark.parametrize("name", structures.SIZES)
def test_structures_have_the_size_of_the_librarys(name: str) -> None:
    assert getattr(native.kernels(), name)() == ctypes.sizeof(structures.SIZES[name])
