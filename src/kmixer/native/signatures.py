"""What every compiled kernel takes, and calls that are checked against it.

A C function believes what it is given: a wrong number of arguments or a tensor of another dtype would corrupt memory.
So a call of a kernel raises TypeError where number, kind, dtype, device or layout of an argument is not that of the
table. That sizes fit the tensors is up to the caller.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kmixer.native.library import kernels
from kmixer.native.structures import SIZES, Attention, AttentionGradients

# Kinds of arguments, by letter. Tensors are contiguous and on a CPU:
#   f float32   F float32 or None   r float32 or None, whose rows may lie apart   d float64   i int64   j int32
#   e float32 or bfloat16, all of a call the same   E the same, or None
# (a function with these has one argument more, whether it is bfloat16, which `call` adds),
# and the rest as ctypes has it:
#   n int64   u uint32   x float   p addresses of several tensors   A, G the structures of structures.py
SIGNATURES = {
    "rms_norm_forward": "efef nn x",
    "rms_norm_backward": "effeE ef nn",
    "normalize_forward": "fff nn x",
    "normalize_backward": "ffff nn x",
    "silu_gate_forward": "eee nn",
    "silu_gate_backward": "eee ee nn",
    "dropout": "ee nn uux",
    "bias_gelu_dropout_forward": "efe nn uux",
    "bias_gelu_dropout_backward": "efe ef nn uux",
    "bias_dropout_add_forward": "eefe nn uux",
    "bias_dropout_add_backward": "eE f nn uux",
    "linear_forward": "efFE e nnn uux",
    "linear_backward": "eef efF nnn uux",
    "pointwise_norm_forward": "efe nn n",
    "pointwise_norm_backward": "efeE ef nn n",
    "feed_forward_forward": "efffff eef nnn x uux nn",
    "feed_forward_backward": "e effffef efffff nnn uux nn",
    "hidden_units_forward": "fff ff nnn uux",
    "hidden_units_backward": "f ffff fff nnn uux",
    "fast_weights_forward": "ffffFF f ff nnnnnn xx",
    "fast_weights_backward": "fFffff F f ffff FF ff nnnnnn xx",
    "cross_entropy_forward": "fi fff nn x",
    "cross_entropy_backward": "fi fff f nn x",
    "filter_and_halve_forward": "fffF f nnnnn",
    "filter_and_halve_backward": "fffF f fffF nnnnn",
    "dense_forward": "fff nnnn",
    "dense_backward": "fff ff nnnn",
    "filter_forward": "eefe nnnn n",
    "filter_backward": "eefe eed nnnn n",
    "decay_forward": "ffeff ef nnnn",
    "decay_backward": "ffeffef ffedf nnnn",
    "heads_apart": "f p rr n nn nnnn n",
    "suffix_matches": "iiii nnnn nn",
    "suffix_begin": "jii nnnn",
    "suffix_step": "jiii nn",
    "suffix_text": "jii nnn",
    "race": "fidi nnn",
    "sinkhorn_forward": "fff fff nnnnnn x",
    "sinkhorn_backward": "fffffff fff nnnnnn x",
    "hierarchical_forward": "A",
    "hierarchical_backward": "AG",
}

Converter = Callable[[Any], Any]


class _Kernel(NamedTuple):
    """A C function, what converts its arguments, and of those that may have 16 bits where the first stands."""

    function: Any
    converters: tuple[Converter, ...]
    element: int | None
    narrow: tuple[Converter, ...]  # the converters where those have 16 bits


def call(name: str, *arguments: Tensor | float | ctypes.Structure | ctypes.Array[ctypes.c_void_p] | None) -> None:
    """Run a kernel with as many threads as torch has.

    Raises:
        TypeError: a wrong number of arguments, or one that is not what the kernel takes.
    """
    function, converters, element, narrow = _KERNELS[name]
    if len(arguments) != len(converters):
        raise TypeError(f"{name}: got {len(arguments)} arguments; it takes {len(converters)}")
    more: tuple[int, ...] = (torch.get_num_threads(),)
    if element is not None:
        bfloat16 = getattr(arguments[element], "dtype", None) is torch.bfloat16
        converters = narrow if bfloat16 else converters
        more = (int(bfloat16), *more)
    try:
        function(*[convert(x) for convert, x in zip(converters, arguments)], *more)  # noqa: B905
    except (ctypes.ArgumentError, TypeError) as error:
        raise TypeError(f"{name}: {error}") from None


def pointer(tensor: Tensor, dtype: torch.dtype = torch.float32) -> int:
    """Where a tensor's numbers begin, for a field of a structure; the tensor must be kept until the call returns."""
    return _address(tensor, dtype)


def addresses(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    """An argument for a kernel that takes several tensors; they must be kept until it has returned."""
    return (ctypes.c_void_p * len(tensors))(*(_address(tensor, torch.float32) for tensor in tensors))


def _address(x: object, dtype: torch.dtype) -> int:
    if not isinstance(x, Tensor) or x.dtype is not dtype or not x.is_cpu or not x.is_contiguous():
        raise TypeError(f"got {_described(x)}; it takes a contiguous tensor of {dtype} on a CPU")
    return _memory(x)


def _memory(x: Tensor) -> int:
    address = x.data_ptr()
    if not address and x.numel():
        raise TypeError("got a tensor without memory, as in FakeTensorMode")
    return address


def _described(x: object) -> str:
    if not isinstance(x, Tensor):
        return repr(x)
    return f"a tensor {tuple(x.shape)} of {x.dtype} on {x.device} with strides {x.stride()}"


def _of_dtype(dtype: torch.dtype) -> Converter:
    # Written out: this is called several times for every operator of a small layer.
    def convert(x: Any) -> int:
        try:
            if x.dtype is dtype and x.is_cpu and x.is_contiguous() and (address := x.data_ptr()):
                return address  # type: ignore[no-any-return]
        except AttributeError:  # no tensor at all
            pass
        return _address(x, dtype)

    return convert


def _or_none(x: object, dtype: torch.dtype = torch.float32) -> int | None:
    return None if x is None else _address(x, dtype)


def _rows_or_none(x: object) -> int | None:
    if x is None:
        return None
    if not isinstance(x, Tensor) or x.dtype is not torch.float32 or not x.is_cpu or x.stride(-1) != 1:
        raise TypeError(f"got {_described(x)}; it takes rows of torch.float32 on a CPU")
    return _memory(x)


def _as_it_is(x: Any) -> Any:
    return x  # ctypes checks it against the argument's type


def _array(x: object) -> object:
    if not isinstance(x, ctypes.Array) or x._type_ is not ctypes.c_void_p:
        raise TypeError(f"got {x!r}; it takes what native.addresses makes")
    return x


_KINDS: dict[str, tuple[Any, Converter]] = {
    "f": (ctypes.c_void_p, _of_dtype(torch.float32)),
    "F": (ctypes.c_void_p, _or_none),
    "r": (ctypes.c_void_p, _rows_or_none),
    "e": (ctypes.c_void_p, _of_dtype(torch.float32)),
    "E": (ctypes.c_void_p, _or_none),
    "d": (ctypes.c_void_p, _of_dtype(torch.float64)),
    "i": (ctypes.c_void_p, _of_dtype(torch.int64)),
    "j": (ctypes.c_void_p, _of_dtype(torch.int32)),
    "n": (ctypes.c_int64, _as_it_is),
    "u": (ctypes.c_uint32, _as_it_is),
    "x": (ctypes.c_float, _as_it_is),
    "p": (ctypes.c_void_p, _array),
    "A": (ctypes.POINTER(Attention), _as_it_is),
    "G": (ctypes.POINTER(AttentionGradients), _as_it_is),
}


# Of tensors that may have 16 bits, where they do.
_NARROW: dict[str, Converter] = {
    "e": _of_dtype(torch.bfloat16),
    "E": functools.partial(_or_none, dtype=torch.bfloat16),
}


def _declared(library: ctypes.CDLL) -> dict[str, _Kernel]:
    """The functions of a library with their arguments' types set, and what converts arguments for them."""
    for name, structure in SIZES.items():
        size = getattr(library, name)
        size.restype = ctypes.c_int64
        if (built := size()) != ctypes.sizeof(structure):
            raise RuntimeError(f"{structure.__name__}: {built} bytes in the library, {ctypes.sizeof(structure)} here")
    declared = {}
    for name, spaced in SIGNATURES.items():
        letters = spaced.replace(" ", "")
        element = letters.find("e") if "e" in letters else None
        function = getattr(library, name)
        function.restype = None
        more = [] if element is None else [ctypes.c_int32]
        function.argtypes = [*(_KINDS[letter][0] for letter in letters), *more, ctypes.c_int64]
        wide = {letter: convert for letter, (_, convert) in _KINDS.items()}
        converters = [tuple(kinds[letter] for letter in letters) for kinds in (wide, wide | _NARROW)]
        declared[name] = _Kernel(function, converters[0], element, converters[1])
    return declared


_KERNELS = {} if (_library := kernels()) is None else _declared(_library)
