"""Where a measurement was made: versions, device, commit."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from kmixer.files import plain_text
from kmixer.version import VERSION


def environment(device: torch.device, processes: int = 1) -> dict[str, Any]:
    """Versions, device and commit a measurement was made with."""
    packages = ("numpy", "safetensors", "sentencepiece", "tokenizers", "pydantic", "accelerate")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "kmixer": VERSION,
        "commit": _commit(),
        "python": platform.python_version(),
        # torch's own word of its version names the build for a CPU or a GPU too.
        "packages": {"torch": torch.__version__, **{package: metadata.version(package) for package in packages}},
        "platform": platform.platform(),
        "device": f"{device.type}: {name}",
        "threads": torch.get_num_threads(),
        "processes": processes,
        "command": [Path(sys.argv[0]).name, *map(plain_text, sys.argv[1:])],
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of the checkout this package runs from; None where it was installed from elsewhere."""
    package = Path(__file__).parents[1]
    root = package.parent.parent
    if not (root / ".git").exists() or package.parent.name != "src" or shutil.which("git") is None:
        return None
    answer = subprocess.run(
        ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
        capture_output=True,
        text=True,
        check=False,
    )
    return answer.stdout.strip() or None
