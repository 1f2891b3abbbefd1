"""Attention as functions: softmax, Gaussian and hierarchical."""
