"""Which build of the compiled kernels runs on this machine.

The three builds are plain shared libraries with a C interface. A library that was built from other sources than those
that lie beside it (its rebuild failed) is not loaded, with a warning.
"""

from __future__ import annotations

import ctypes
import warnings
from pathlib import Path

import torch

from kmixer.native.digest import sources_digest

# Which build runs on which processor, best first, by torch's name for what the processor can do. The variable
# ATEN_CPU_CAPABILITY (avx2, default) makes torch name less.
BUILDS = {"AVX512": ("avx512", "avx2", "generic"), "AVX2": ("avx2", "generic")}


def _load() -> ctypes.CDLL | None:
    for build in BUILDS.get(torch.backends.cpu.get_cpu_capability(), ("generic",)):
        if (file := built(build)).exists():
            return _if_current(ctypes.CDLL(str(file)), file.parent)
    return None


def built(build: str) -> Path:
    """Where a build lies, if it was made. It is no module of Python's: one file serves every version."""
    return Path(__file__).parent / f"_kernels_{build}.so"


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
