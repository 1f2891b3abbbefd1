"""Strict configurations: every mistake in a recipe is one line that names the key and what is allowed."""

from __future__ import annotations

import difflib
import re
from typing import Any, Self, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from kmixer.errors import InputError, shown


SHOWN_PROBLEMS = 10


class StrictConfig(BaseModel):
    """Base of all configurations: no unknown keys, no conversions, no changes after construction."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @classmethod
    def parse(cls, values: Any, *, source: str) -> Self:
        """Validate nested plain values. Raises InputError, one line; `source` says where they are from."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            # A list whose only items are wrong is then called too short as well.
            found = [each for each in error.errors(include_url=False) if each["type"] != "too_short" or not each["input"]]
            problems = [_describe(cls, problem) for problem in found[:SHOWN_PROBLEMS]]
            more = [f"and {len(found) - SHOWN_PROBLEMS:,} more"] if len(found) > SHOWN_PROBLEMS else []
            raise InputError(f"{source}: " + "; ".join(problems + more)) from None


def _describe(config: type[BaseModel], problem: Any) -> str:
    path, allowed = _walk(config, problem["loc"])
    key = shown_key(".".join(path)) if path else "the whole"
    kind, given = problem["type"], problem["input"]
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(path[-1], allowed, n=1)
        return f"unknown key {key}; {f'did you mean {near[0]}? ' if near else ''}allowed: {', '.join(allowed)}"
    if kind == "missing":
        return f"{key} is missing"
    if kind == "literal_error":
        return f"{key}: got {shown(given)}; allowed: {problem['ctx']['expected']}"
    if kind == "union_tag_invalid":
        return f"{key}.kind: got {shown(problem['ctx']['tag'])}; allowed: {problem['ctx']['expected_tags']}"
    if kind == "value_error":  # raised by a validator of ours, whose message says all
        message = str(problem["ctx"]["error"])
        return f"{key}: {message}" if path else message
    if kind == "model_type":
        return f"{key}: got {shown(given)}; it should be a group of keys"
    if kind == "too_short":
        return f"{key}: got {shown(given)}; it should not be empty"
    message = problem["msg"].removeprefix("Input ")
    return f"{key}: got {shown(given)}; it {message}"


def shown_key(key: str) -> str:
    """A key for a message: as it is where it could be one of ours, otherwise quoted and cut."""
    return key if re.fullmatch(r"[\w.=,+-]{1,100}", key) else shown(key)


def _walk(config: type[BaseModel], location: tuple[Any, ...]) -> tuple[list[str], list[str]]:
    """The keys on the way to a place, without the kinds that choose between configurations, and those allowed there."""
    path: list[str] = []
    here = [config]
    allowed: list[str] = list(config.model_fields)
    for part in location:
        if len(here) > 1:  # a choice: this part names the kind
            here = [option for option in here if option.model_fields["kind"].default == part]
            allowed = list(here[0].model_fields)
            continue
        path.append(str(part))
        if here and part in here[0].model_fields:
            allowed = list(here[0].model_fields)
            here = configs_in(here[0].model_fields[part].annotation)
        elif here:
            allowed = list(here[0].model_fields)
    return path, allowed


def configs_in(annotation: Any) -> list[type[BaseModel]]:
    """The configurations a type annotation mentions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [config for part in get_args(annotation) for config in configs_in(part)]
