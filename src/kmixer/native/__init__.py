"""The compiled CPU kernels: built at installation where there is a C++ compiler, never required.

`usable(...)` says whether they may take these tensors, `multiplies(...)` whether they may make products of them,
`call(name, ...)` runs one; `kernels()` is the library that was loaded. A kernel is a C function: `signatures.py` lists
them all.
"""

from kmixer.native.dispatch import multiplies, plain, product_dtype, transformed, usable
from kmixer.native.library import kernels
from kmixer.native.signatures import addresses, call, pointer

__all__ = [
    "addresses",
    "call",
    "kernels",
    "multiplies",
    "plain",
    "pointer",
    "product_dtype",
    "transformed",
    "usable",
]
