"""Recipes, run folders and archives: all that reads or writes a run without training it."""
