"""Experiments: sweeps over seeds and settings, and the statistics that compare them."""
