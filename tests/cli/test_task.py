"""kmixer task."""

from __future__ import annotations

import json

from kmixer.experiments.denoise import BLOCKS
from tests.cli.conftest import Run


def test_denoising(kmixer_command: Run) -> None:
    rows = json.loads(kmixer_command("task", "denoise", "--seeds", 1, "--steps", 2, "--json").out)
    assert [row["mixer"] for row in rows] == list(BLOCKS)
    assert "allowed: 1 or more" in kmixer_command("task", "denoise", "--seeds", 0).error()
