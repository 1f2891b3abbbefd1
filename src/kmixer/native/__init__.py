"""The compiled CPU kernels: built at installation where there is a C++ compiler, never required.

`kernels()` is the library for this machine's processor, or None. Its three builds are plain
shared libraries with a C interface; tensors are passed by address. A library that was built from other
sources than those that lie beside it (its rebuild failed) is not loaded, with a warning.
"""

from __future__ import annotations

import ctypes
import importlib.util
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from kmixer.native.digest import sources_digest

# Arguments of a kernel that ctypes passes as they are.
Ready = ctypes.c_void_p | ctypes.c_int32 | ctypes.Array[ctypes.c_void_p]

# Which build runs on which processor, best first, by torch's name for what the processor can do.
BUILDS = {"AVX512": ("avx512", "avx2", "generic"), "AVX2": ("avx2", "generic")}


def _load() -> ctypes.CDLL | None:
    for build in BUILDS.get(torch.backends.cpu.get_cpu_capability(), ("generic",)):
        spec = importlib.util.find_spec(f"kmixer.native._kernels_{build}")
        if spec is not None and spec.origin is not None:
            return _if_current(ctypes.CDLL(spec.origin), Path(__file__).parent)
    return None


def _if_current(library: ctypes.CDLL, folder: Path) -> ctypes.CDLL | None:
    """The library, or None with a warning where it was built from other sources than the folder's."""
    if hasattr(library, "sources_digest"):
        library.sources_digest.restype = ctypes.c_char_p
        if library.sources_digest() == sources_digest(folder).encode():
            return library
    warnings.warn(
        "the compiled kernels were built from other sources, so slower torch code runs: install kmixer again "
        "(pip install -e .), and read its output with -v where that does not help",
        stacklevel=2,
    )
    return None


_LIBRARY = _load()


def kernels() -> ctypes.CDLL | None:
    """The compiled kernels, or None where none were built."""
    return _LIBRARY


def usable(*tensors: Tensor) -> bool:
    """Whether the compiled kernels can take these: built, on a CPU, outside torch.compile and torch.export."""
    return not torch.compiler.is_compiling() and available(*tensors)


def available(*tensors: Tensor) -> bool:
    """The same for kernels that are custom operators of torch, which torch.compile can hold."""
    # To torch 2.11, what torch.compile traces is being exported too.
    exporting = torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()
    return kernels() is not None and all(x.device.type == "cpu" for x in tensors) and not exporting


def addresses(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    """An argument for a kernel that takes several tensors; they must be kept until it has returned."""
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


def call(name: str, *arguments: Tensor | float | Ready | None) -> None:
    """Call a kernel; tensors go by the address of their first element and must be contiguous, None as null.

    Whole numbers go as int64 unless wrapped in a ctypes type; floats as float.
    """
    library = kernels()
    assert library is not None
    getattr(library, name)(*(_convert(argument) for argument in arguments), ctypes.c_int64(torch.get_num_threads()))


def _convert(argument: Tensor | float | Ready | None) -> object:
    if isinstance(argument, Tensor):
        address = argument.data_ptr()
        if not address and argument.numel():
            raise RuntimeError("a compiled kernel got a tensor without memory, as in FakeTensorMode")
        return ctypes.c_void_p(address)
    if isinstance(argument, int):
        return ctypes.c_int64(argument)
    if isinstance(argument, float):
        return ctypes.c_float(argument)
    if argument is None:
        return ctypes.c_void_p()
    return argument
