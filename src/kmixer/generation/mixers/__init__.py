"""Mixers that a prepared decoding step knows: a file for each, and its line in `registry.py`."""
