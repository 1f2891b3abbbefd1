"""Strict configurations: every mistake in a recipe is one line that names the key and what is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Annotated, Any, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kmixer.errors import InputError, shown, shown_name

SHOWN_PROBLEMS = 10

# What a configuration may ask for. The bounds are far above any model there is: they keep a mistyped number, or a file
# made to do harm, from overflowing a size or from building layers for hours.
Positive = Annotated[int, Field(ge=1, lt=1 << 31)]
Width = Annotated[int, Field(ge=1, le=1 << 16)]  # of hidden vectors, channels, heads
Layers = Annotated[int, Field(ge=1, le=1 << 10)]
Taps = Annotated[int, Field(ge=1, le=1 << 20)]  # lags or positions of a kernel
Vocabulary = Annotated[int, Field(ge=1, le=1 << 24)]
Multiplier = Annotated[int, Field(ge=1, le=1 << 10)]

Probability = Annotated[float, Field(ge=0, lt=1)]


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
            problems = [
                problem
                for problem in error.errors(include_url=False)
                if problem["type"] != "too_short" or not problem["input"]
            ]
            said = [_describe(cls, problem) for problem in problems[:SHOWN_PROBLEMS]]
            more = [f"and {len(problems) - SHOWN_PROBLEMS:,} more"] if len(problems) > SHOWN_PROBLEMS else []
            raise InputError(f"{source}: " + "; ".join(said + more)) from None


def _describe(config: type[BaseModel], problem: Any) -> str:
    path, allowed = _walk(config, problem["loc"])
    key = shown_name(".".join(path)) if path else "the whole"
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
    if kind == "string_type":
        return f"{key}: got {shown(given)}; it should be text, in quotes"
    if kind == "model_type":
        return f"{key}: got {shown(given)}; it should be a group of keys"
    if kind == "too_short":
        return f"{key}: got {shown(given)}; it should not be empty"
    message = problem["msg"].removeprefix("Input ")
    return f"{key}: got {shown(given)}; it {message}"


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


def is_text(config: type[BaseModel], keys: Sequence[str]) -> bool:
    """Whether the value under these nested keys is a text in every configuration that may stand there."""
    here = [config]
    *parents, last = keys
    for parent in parents:
        here = [
            option
            for candidate in here
            if parent in candidate.model_fields
            for option in configs_in(candidate.model_fields[parent].annotation)
        ]
    kinds = [candidate.model_fields[last].annotation for candidate in here if last in candidate.model_fields]
    return bool(kinds) and all(set(get_args(kind) or (kind,)) - {type(None)} == {str} for kind in kinds)


def configs_in(annotation: Any) -> list[type[BaseModel]]:
    """The configurations a type annotation mentions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [config for part in get_args(annotation) for config in configs_in(part)]
