"""A state is an immutable tree of tensors, batch first: what a layer carries from one call to the next."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    State = Tensor | tuple["State", ...] | None
else:  # what checks annotations at run time cannot follow a type that holds itself
    State = Tensor | tuple | None
