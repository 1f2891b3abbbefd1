"""The compiled kernels are loaded only where they were built from the sources beside them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from kmixer.native import library as native


def test_a_library_of_other_sources_is_not_loaded(tmp_path: Path) -> None:
    library = native.kernels()
    if library is None:
        pytest.skip("the compiled kernels were not built")
    here = Path(native.__file__).parent
    assert native._if_current(library, here) is library
    for path in [*here.glob("*.cpp"), *here.glob("*.h")]:
        shutil.copy(path, tmp_path)
    assert native._if_current(library, tmp_path) is library
    with (tmp_path / "decay.cpp").open("a") as file:
        file.write("\n")
    with pytest.warns(UserWarning, match="built from other sources"):
        assert native._if_current(library, tmp_path) is None
