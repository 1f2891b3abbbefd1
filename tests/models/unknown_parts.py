"""Ways to change what a part of a model computes, none of which a fast path may overlook.

Each way makes a part give x + sin(x) where it gave x, so that all of them make the same model.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from kmixer.layers.exactly import exactly

# Given a model and the name of a part of it, change the part.
Way = Callable[[nn.Module, str], None]


def _bent(output: Any) -> Any:
    """The output, or the first of several, or all by name; not in proportion, which a norm behind it would undo."""
    if isinstance(output, dict):
        return {name: _bent(value) for name, value in output.items()}
    if isinstance(output, tuple):
        return _bent(output[0]), *output[1:]
    return output + torch.sin(output)


def by_a_hook(model: nn.Module, name: str) -> None:
    """A forward hook, as measurements and adapters set it."""
    model.get_submodule(name).register_forward_hook(lambda module, inputs, output: _bent(output))


def by_a_replaced_forward(model: nn.Module, name: str) -> None:
    """Another `forward` of this one module, as accelerate's hooks have it."""
    part = model.get_submodule(name)
    forward = part.forward
    part.forward = lambda *given, **more: _bent(forward(*given, **more))  # type: ignore[method-assign]


def by_a_subclass(model: nn.Module, name: str) -> None:
    """A class of its own, as torch's parametrizations have it."""
    part = model.get_submodule(name)
    kind = type(part)
    part.__class__ = type(
        f"Bent{kind.__name__}",
        (kind,),
        {"forward": lambda self, *given, **more: _bent(kind.forward(self, *given, **more))},
    )


class Wrapper(nn.Module):
    """Another module in the place of the part, as adapters have it; it has nothing else that the part had."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, *given: Any, **more: Any) -> Any:
        return _bent(self.part(*given, **more))


def by_a_wrapper(model: nn.Module, name: str) -> None:
    """A `Wrapper` around the part."""
    holder, _, last = name.rpartition(".")
    parent = model.get_submodule(holder)
    wrapper = Wrapper(model.get_submodule(name))
    if isinstance(parent, nn.ModuleList):
        parent[int(last)] = wrapper
    else:
        setattr(parent, last, wrapper)


WAYS: tuple[Way, ...] = (by_a_hook, by_a_replaced_forward, by_a_subclass, by_a_wrapper)


def without_fast_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no part be exactly known, so that every one is called."""
    asking = [name for name, file in sys.modules.items() if vars(file).get("exactly") is exactly]
    assert "kmixer.layers.block" in asking
    for name in asking:
        if name.startswith("kmixer."):
            monkeypatch.setattr(f"{name}.exactly", lambda *_: False)
