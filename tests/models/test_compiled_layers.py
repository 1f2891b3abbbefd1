"""Stacks under torch.compile: one program for each kind of layer, whatever the batch size and length."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any


def unique_graphs(kind: str, stacks: list[dict[str, Any]]) -> list[int]:
    command = [sys.executable, "-m", "tests.models.compiled_layers", kind, json.dumps(stacks)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    found: list[int] = json.loads(answer.stdout)
    return found


def test_both_k1_layers_share_a_program_and_so_do_all_k2_layers() -> None:
    bases = [{"kind": "conv", "size": 8}, {"kind": "dense", "size": 100}, {"kind": "none"}]
    stacks: list[dict[str, Any]] = [{"rank": 4, "base_kernel": {"shared": True, **base}} for base in bases]
    stacks.append({"rank": 4, "dtype": "float64"})  # not by the compiled kernels, which are for float32
    stacks.append({"rank": 4, "copies": True})
    assert unique_graphs("k-stack", stacks) == [2] * 5


def test_blocks_of_a_kind_share_a_program() -> None:
    stacks: list[tuple[dict[str, Any], int]] = [
        ({"mixers": "softmax", "softmax": {"convolution": 4}}, 1),
        # Windows have one for lengths of whole blocks, and one for the others.
        ({"mixers": "softmax", "windows": "SSL", "window": 8}, 3),
        ({"mixers": "gaussian", "blocks": "nanochat", "copies": True}, 1),
        ({"mixers": "hierarchical"}, 1),
        ({"mixers": "k2"}, 1),
        ({"mixers": "sinkhorn", "causal": False}, 1),
    ]
    settings, programs = zip(*stacks, strict=True)
    assert unique_graphs("transformer", list(settings)) == list(programs)
