"""Which sources the compiled kernels were built from: asked by setup.py at the build, and when they are loaded."""

from __future__ import annotations

import hashlib
from pathlib import Path


def sources_digest(folder: Path) -> str:
    """sha256 of the C++ files of a folder, in the order of their names."""
    paths = sorted([*folder.glob("*.cpp"), *folder.glob("*.h")])
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()
