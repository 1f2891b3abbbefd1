"""Decayed linear attention: the recurrence that defines it, and its faster forms.

`recurrence.py` has the function that all use, its definition and the choice of a backend; `block.py`, `native.py` and
`launch.py` (with `kernels.py`, Triton) are backends; `operator.py` is what these share.
"""
