"""The K-Stack under torch.compile."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("kind", ["conv", "dense", "none"])
def test_compiled_layers_are_the_layers_at_every_length(kind: str) -> None:
    command = [sys.executable, "-m", "tests.models.compiled_layers", kind]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    # One program for both K1 layers and one for all K2 layers, whatever the batch size and length.
    assert int(answer.stdout) == 2
