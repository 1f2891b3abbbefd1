"""Threads of the kernels: torch's own, and where a process has none of them, some for a call."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kmixer.native.library import kernels

# One kernel by ctypes alone: file of the library, whether torch is there first. All numbers of threads give the same.
PROGRAM = """
import ctypes, sys

file, first = sys.argv[1:]
if first == "torch":
    import torch
assert hasattr(ctypes.CDLL(None), "GOMP_parallel") == (first == "torch" and sys.platform == "linux")
library = ctypes.CDLL(file)
rows, width = 1001, 16
numbers = ctypes.c_float * (rows * width)
x = numbers(*(1 + i % 97 for i in range(rows * width)))
weight = (ctypes.c_float * width)(*range(width))

def normed(threads):
    y, inverse = numbers(), (ctypes.c_float * rows)()
    sizes = ctypes.c_int64(rows), ctypes.c_int64(width)
    library.rms_norm_forward(x, weight, y, inverse, *sizes, ctypes.c_float(1e-6), 0, ctypes.c_int64(threads))
    return list(y)

once = normed(1)
assert any(once[-width:])
assert all(normed(threads) == once for threads in (2, 3, 7, 2))
"""


@pytest.mark.parametrize("first", ["torch", "nothing"])
def test_any_number_of_threads_gives_the_same(first: str) -> None:
    """The library loads without an OpenMP runtime, and finds torch's."""
    library = kernels()
    if library is None:
        pytest.skip("the compiled kernels were not built")
    command = [sys.executable, "-c", PROGRAM, library._name, first]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
