"""Where a measurement was made."""

from __future__ import annotations

import re

import torch

import kmixer
from kmixer.runs.environment import environment


def test_it_says_versions_device_and_commit() -> None:
    there = environment(torch.device("cpu"), processes=3)
    assert there["kmixer"] == kmixer.__version__
    assert there["packages"]["torch"] == torch.__version__
    assert there["device"].startswith("cpu: ")
    assert (there["processes"], there["threads"]) == (3, torch.get_num_threads())
    assert there["commit"] is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", there["commit"])
