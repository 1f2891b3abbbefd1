"""A model cut short, as a draft for the whole: its first layers, or fewer passes of its refinement.

What is left shares the weights of the model and is a model like any other: the first mixing layers, then what comes
after the last one, norm and head. Nothing trained it to predict; whatever it proposes is verified.
"""

from __future__ import annotations

import copy
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from kmixer.errors import InputError
from kmixer.layers.copy_memory import CopyMemory
from kmixer.models.causal_lm import CausalLM
from kmixer.models.k_stack import KStack

AModule = TypeVar("AModule", bound=nn.Module)


def first_layers(model: CausalLM, count: int) -> CausalLM:
    """The model with its first `count` mixing layers.

    Raises InputError for no layer, and for all of them.
    """
    layers = len(model.stack.blocks)
    if not 1 <= count < layers:
        raise InputError(f"draft: got self:{count}; {_allowed(layers, 'layer')}")
    short = _view(model)
    short.stack = _view(model.stack)
    short.stack.blocks = nn.ModuleList(list(model.stack.blocks)[:count])
    if model.copy_memory is not None:
        short.copy_memory = _copies_of(model.copy_memory, count)
    return short


def fewer_passes(model: CausalLM, count: int) -> CausalLM:
    """The model with `count` of its passes of refinement.

    Raises InputError for no pass, for all of them, and for a model that is not refined.
    """
    passes = model.stack.passes if isinstance(model.stack, KStack) else 1
    if not 1 <= count < passes:
        raise InputError(f"draft: got self:passes={count}; {_allowed(passes, 'pass', 'passes')}")
    short = _view(model)
    short.stack = _view(model.stack)
    cast("KStack", short.stack).passes = count
    return short


def _allowed(parts: int, one: str, several: str = "layers") -> str:
    if parts == 1:
        return f"this model has one {one}, which cannot be left out; choose another draft"
    return f"allowed: 1 to {parts - 1}, as this model has {parts} {several}"


def _view(module: AModule) -> AModule:
    """The same module, whose parts can be exchanged without touching the first."""
    view = copy.copy(module)
    view._modules, view._parameters = dict(module._modules), dict(module._parameters)
    if isinstance(view, CausalLM):
        view._initial = None  # states have other parts
    return view


def _copies_of(memory: CopyMemory, layers: int) -> CopyMemory:
    """What the first layers take of the copies."""
    taken = [index for index, layer in enumerate(memory.layers) if layer < layers]

    def chosen(values: Tensor) -> nn.Parameter:
        return nn.Parameter(values.detach()[torch.tensor(taken, dtype=torch.int64, device=values.device)])

    view = _view(memory)
    view.layers = tuple(memory.layers[index] for index in taken)
    view.gate_logit = chosen(memory.gate_logit)
    if memory.length_gate is not None:
        view.length_gate = chosen(memory.length_gate)
    if memory.second is not None:
        view.second = _copies_of(memory.second, layers)
    return view
