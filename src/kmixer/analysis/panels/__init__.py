"""Panels of a report: one file per kind of measurement; `kmixer.analysis.figures` lists them."""
