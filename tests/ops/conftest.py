"""What tests of operators share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from jaxtyping import config


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Without the checks of shapes and dtypes that other tests run under, as for a user."""
    config.update("jaxtyping_disable", True)  # type: ignore[no-untyped-call]
    yield
    config.update("jaxtyping_disable", False)  # type: ignore[no-untyped-call]
