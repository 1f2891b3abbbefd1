"""What all records of files are made of: their base, and the numbers that may stand in them."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import ConfigDict, Field

from kmixer.config import StrictConfig

# Any measured number; what is larger is no measurement, and axes of figures overflow on it.
Number = Annotated[float, Field(ge=-1e30, le=1e30)]
Count = Annotated[int, Field(ge=0, le=10**15)]
Seconds = Annotated[float, Field(ge=0, le=1e12)]
PerHead = Annotated[list[Annotated[list[Number], Field(min_length=1)]], Field(min_length=1)]
# (layers, heads, levels)
PerLevel = Annotated[list[PerHead], Field(min_length=1)]


class Record(StrictConfig):
    """Base of the records: what is read has its type, what a later version added is passed over."""

    model_config = ConfigDict(extra="ignore")


def shape_of(value: Any) -> Any:
    """The shape of nested lists: a tuple of lengths where they make an array, otherwise a list of shapes."""
    if not isinstance(value, list):
        return ()
    shapes = [shape_of(part) for part in value] if value and isinstance(value[0], list) else [()] * len(value)
    alike = all(shape == shapes[0] for shape in shapes) and all(isinstance(shape, tuple) for shape in shapes)
    return (len(value), *(shapes[0] if shapes else ())) if alike else shapes


def check_even(value: Any, name: str) -> None:
    """Raises ValueError for nested lists that make no array."""
    if value is not None and not isinstance(shape_of(value), tuple):
        raise ValueError(f"{name}: its lists have different lengths")


def check_lengths(record: Record, called: str, likes: dict[str, str]) -> None:
    """Raises ValueError for a list of the record, by name, that is not as long as the one it goes with."""
    for name, like in likes.items():
        if len(getattr(record, name)) != len(getattr(record, like)):
            raise ValueError(f"{called}.{name}: it has another length than {called}.{like}")
