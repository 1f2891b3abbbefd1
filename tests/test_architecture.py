"""Imports point downward and make no circle, and a mixer is named in its own files only."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import kmixer
from kmixer.models.mixers.registry import CARDS

ROOT = Path(kmixer.__file__).parent
# From the bottom. A module may import what stands lower, and beside it where that makes no circle of packages.
LEVELS = (
    ("errors", "version", "config", "files", "tensor_files", "state", "trail"),
    ("native",),
    ("ops",),
    ("layers",),
    ("data",),
    ("models", "runs"),
    ("measure",),
    ("generation", "interop", "training", "language_model"),
    ("bench", "experiments", "huggingface"),
    ("analysis",),
    ("cli", "evals", "serve", "__main__", "__init__"),
)
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names}


def module_name(path: Path) -> str:
    parts = [*path.relative_to(ROOT.parent).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


TREES = {module_name(path): ast.parse(path.read_text(encoding="utf-8")) for path in sorted(ROOT.rglob("*.py"))}
PATHS = {module_name(path): path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py")}


def part_of(module: str) -> str:
    """The package or top module that a module belongs to."""
    return module.split(".")[1] if "." in module else "__init__"


def imports_of(module: str) -> set[str]:
    """The modules of ours that a module imports anywhere, inside functions too."""
    found = set()
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None and node.level == 0, f"{module}: imports by the whole name only"
            whole = {f"{node.module}.{name.name}" for name in node.names}
            found |= {name if name in TREES else node.module for name in whole}
    return found & TREES.keys()


IMPORTS = {module: imports_of(module) for module in TREES}


def circle_in(graph: dict[str, set[str]]) -> list[str]:
    """The names of one circle, or none."""
    left = {name: {other for other in others if other != name} for name, others in graph.items()}
    while free := [name for name, others in left.items() if not others & left.keys()]:
        for name in free:
            del left[name]
    way: list[str] = []
    while left and (not way or way[-1] not in way[:-1]):
        way.append(min(left[way[-1]] & left.keys()) if way else min(left))
    return way[way.index(way[-1]) :] if way else []


def test_every_part_has_a_level() -> None:
    assert {part_of(module) for module in TREES} <= LEVEL_OF.keys()


def test_no_import_points_upward() -> None:
    upward = [
        f"{module} imports {other}"
        for module, others in IMPORTS.items()
        for other in others
        if LEVEL_OF[part_of(other)] > LEVEL_OF[part_of(module)]
    ]
    assert upward == []


def test_modules_make_no_circle() -> None:
    assert circle_in(IMPORTS) == []


def test_packages_make_no_circle() -> None:
    packages: dict[str, set[str]] = {}
    for module, others in IMPORTS.items():
        packages.setdefault(part_of(module), set()).update(map(part_of, others))
    assert circle_in(packages) == []


def test_a_circle_is_seen() -> None:
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}}) in (["b", "c", "b"], ["c", "b", "c"])


# What names a mixer beside its own files, and why.
NAMED_BY = {
    "softmax": {
        "layers/hierarchical_attention.py": "is softmax attention over scores of its own, and uses its operator",
        "layers/gaussian_attention.py": "is computed as softmax attention",
        "ops/attention/gaussian.py": "is computed as softmax attention",
        "layers/sinkhorn_attention.py": "is softmax attention with one half-step, which may be causal",
        "ops/attention/sinkhorn.py": "is softmax attention with one half-step",
        "models/known_parts.py": "lists the parts of stacks that are read, one of torch's adaptive softmax among them",
        "experiments/denoise.py": "sets chosen layers side by side: a recipe",
    },
    "gaussian": {
        "models/known_parts.py": "lists the parts of stacks that are read",
        "generation/live_cache.py": "a field of what the compiled step takes",
    },
    "k2": {
        "models/k_stack.py": "the K-Stack is made of it",
        "generation/prepared.py": "steps of the K-Stack, compiled",
        "models/known_parts.py": "lists the parts of stacks that are read",
        "interop/exported_step.py": "steps of the K-Stack, exported",
        "interop/koneko.py": "Koneko's files hold K-Stacks",
        "experiments/denoise.py": "sets chosen layers side by side: a recipe",
        "analysis/panels/k2.py": "draws what is recorded of it",
        "analysis/figures.py": "lists the panels",
    },
}


def own_files(mixer: str) -> set[str]:
    """Card, layer, operator and timing of a mixer, and the lines that list and export them.

    What measures one mixer alone asks layers for a protocol and is named by what it measures, so that it names none.
    """
    layer = CARDS[mixer].layer.__module__.removeprefix("kmixer.").replace(".", "/")
    operators = {path for path in PATHS.values() if path.startswith("ops/") and Path(path).stem.startswith(mixer)}
    lists = {
        "models/mixers/registry.py",
        "generation/mixers/registry.py",
        "layers/__init__.py",
        "ops/__init__.py",
        "ops/attention/__init__.py",
    }
    apart = ("models/mixers", "generation/mixers", "bench/operators")
    return {f"{layer}.py", *(f"{folder}/{mixer}.py" for folder in apart), *operators, *lists}


def identifiers(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name) | ast.keyword(arg=str(name)):
                yield name
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.Import(names=names):
                yield from (part for name in names for part in name.name.split("."))
            case ast.ImportFrom(module=str(module), names=names):
                yield from [*module.split("."), *(name.name for name in names)]


def names_mixer(tree: ast.AST, mixer: str) -> list[str]:
    """Identifiers that have the mixer's name as a word, and strings that are the name; prose does not count.

    Names that torch has are mathematics: `torch.softmax`.
    """
    found = []
    for name in set(identifiers(tree)):
        words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().split("_")
        if mixer in words and not hasattr(torch, name) and not hasattr(torch.nn, name):
            found.append(name)
    strings = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return sorted(found) + [repr(value) for value in strings if value == mixer]


@pytest.mark.parametrize("mixer", CARDS)
def test_a_mixer_is_named_in_its_own_files_only(mixer: str) -> None:
    allowed = own_files(mixer) | NAMED_BY.get(mixer, {}).keys()
    elsewhere = {
        path: names
        for module, path in PATHS.items()
        if path not in allowed and (names := names_mixer(TREES[module], mixer))
    }
    assert elsewhere == {}


def test_a_ladder_is_seen() -> None:
    assert names_mixer(ast.parse("if mixer == 'k2': ..."), "k2") == ["'k2'"]
    assert names_mixer(ast.parse("isinstance(layer, K2Mixer | SoftmaxAttention)"), "k2") == ["K2Mixer"]
    assert names_mixer(ast.parse("torch.softmax(x, -1)  # k2"), "softmax") == []
