"""What a layer carries while it is decoded in place: its state, in the memory that a compiled step reads and writes."""

from __future__ import annotations

import ctypes
import math
from typing import Any

from kmixer.state import State

ALL_ROWS = slice(None)


class Live:
    """The live state of one layer: what all kinds of it have in common."""

    # Positions that there is room for.
    room: float = math.inf

    def bind(self, program: ctypes.Array[Any]) -> None:
        """Know the operations of the step, which were copied there; most need not."""
        return

    def check(self, state: Any) -> None:
        """Raises InputError for a state that is not what this layer returns, where its shapes do not say so."""
        return

    def seen(self, state: Any) -> int:
        """Positions for which a state needs room; 0 where room does not depend on them."""
        return 0

    def allocate(self, rows: int, n: int, seen: int) -> None:
        """Room for so many rows that have seen so much and read n tokens at once; where they stand is not set."""
        raise NotImplementedError

    def state(self, chosen: slice = ALL_ROWS) -> State:
        """Where the chosen rows stand, as the layer has it; a snapshot."""
        raise NotImplementedError

    def stand_at(self, state: Any, first: int = 0) -> None:
        """Let rows, from the first on, stand where a state of as many says; it is copied."""
        raise NotImplementedError

    def move(self, source: int, target: int) -> None:
        """Let a row stand where another stands."""
        raise NotImplementedError
