"""docs/recipes.md names every key of every group of a recipe, and its default."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from kmixer.config import configs_in
from kmixer.runs.recipe import RECIPES

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"

Defaults = dict[tuple[str, str], set[str]]  # of (group, key); "" where there is none


def _written(default: Any) -> str:
    if default is PydanticUndefined or default is None:
        return ""
    if isinstance(default, str):
        return f"`{default}`"
    return json.dumps(default)


def _takes_a_number(annotation: Any) -> bool:
    return annotation is float or any(map(_takes_a_number, get_args(annotation)))


def _collect(config: type[BaseModel], group: str, found: Defaults) -> None:
    for key, field in config.model_fields.items():
        if inner := configs_in(field.annotation):
            for each in inner:
                _collect(each, key, found)
        if not inner or _takes_a_number(field.annotation):  # or in the place of the group
            found[group, key].add(_written(field.default))


def test_every_key_and_default_is_on_the_page() -> None:
    keys: Defaults = defaultdict(set)
    for recipe in RECIPES.values():
        _collect(recipe, "", keys)
    page: Defaults = defaultdict(set)
    group = ""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if begins := re.match(r"(?:## )?`\[([a-z0-9_.]+)\]`", line):
            group = begins[1].rsplit(".", 1)[-1]
        elif row := re.match(r"\| `([a-z_]+)` \|([^|]*)\|", line):
            page[group, row[1]].add(row[2].strip())
    assert page.keys() == keys.keys()
    wrong = {key: (said, keys[key]) for key, said in page.items() if not said <= keys[key]}
    assert not wrong
