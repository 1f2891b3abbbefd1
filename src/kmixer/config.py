"""Strict configurations: every mistake in a recipe is one line that names the key and what is allowed."""

from __future__ import annotations

import difflib
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from kmixer.errors import InputError


class StrictConfig(BaseModel):
    """Base of all configurations: no unknown keys, no conversions, no changes after construction."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @classmethod
    def parse(cls, values: Any, *, source: str) -> Self:
        """Validate nested plain values. Raises InputError, one line; `source` says where they are from."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            problems = [_describe(cls, problem) for problem in error.errors()]
            raise InputError(f"{source}: " + "; ".join(problems)) from None


def _describe(config: type[BaseModel], problem: Any) -> str:
    *parents, last = problem["loc"] or ("",)
    key = ".".join(str(part) for part in problem["loc"]) or "the whole"
    kind, given = problem["type"], problem["input"]
    if kind == "extra_forbidden":
        allowed = _keys_at(config, parents)
        near = difflib.get_close_matches(str(last), allowed, n=1)
        return f"unknown key {key}; {f'did you mean {near[0]}? ' if near else ''}allowed: {', '.join(allowed)}"
    if kind == "missing":
        return f"{key} is missing"
    if kind == "literal_error":
        return f"{key}: got {given!r}; allowed: {problem['ctx']['expected']}"
    if kind == "value_error":  # raised by a validator of ours, whose message says all
        message = str(problem["ctx"]["error"])
        return f"{key}: {message}" if problem["loc"] else message
    if kind == "model_type":
        return f"{key}: got {given!r}; it should be a group of keys"
    if kind == "too_short":
        return f"{key}: got {given!r}; it should not be empty"
    message = problem["msg"].removeprefix("Input ")
    return f"{key}: got {given!r}; it {message}"


def _keys_at(config: type[BaseModel], path: list[Any]) -> list[str]:
    """The allowed keys of the configuration nested at this path."""
    for part in path:
        annotation = config.model_fields[part].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        config = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(config.model_fields)
