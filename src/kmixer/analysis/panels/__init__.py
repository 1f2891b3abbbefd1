"""Panels of a report: one file a kind of measurement; `kmixer.analysis.figures` lists them."""
