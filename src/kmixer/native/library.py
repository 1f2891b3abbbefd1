"""Which build of the compiled kernels runs on this machine.

The builds are plain shared libraries with a C interface. A library that was built from other sources than those
that lie beside it (its rebuild failed) is not loaded, with a warning.
"""

from __future__ import annotations

import ctypes
import warnings
from pathlib import Path

import torch

from kmixer.native.digest import sources_digest

# Best first.
BUILDS = ("avx512bf16", "avx512", "avx2", "generic")


def usable_builds() -> tuple[str, ...]:
    """The builds that this processor runs, best first.

    The variable ATEN_CPU_CAPABILITY (avx2, default) makes torch use less than there is: so do the kernels.
    """
    used = torch.backends.cpu.get_cpu_capability()
    if used == "AVX512":
        return BUILDS if processor_has("avx512_bf16") else BUILDS[1:]
    return BUILDS[2:] if used == "AVX2" else BUILDS[3:]


def processor_has(feature: str) -> bool:
    """Whether torch names this among what the processor can do; older releases of it name nothing."""
    known: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(known.get(feature))


def _load() -> ctypes.CDLL | None:
    for build in usable_builds():
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
