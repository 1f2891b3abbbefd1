"""Attention as functions: softmax, Gaussian, hierarchical and Sinkhorn's.

A file per kind; Gaussian attention is softmax attention of other queries and keys. `native.py` calls the compiled
kernel for a CPU that all of them share; `hierarchical_blocked.py` is the backend without it.
"""
