"""What an optimiser does with a parameter, said by the module that owns it and never guessed from its name.

A module of ours that owns parameters has a method `roles()`: a `Role` for the name of each, as `named_parameters` has
it. It may also say one for a parameter of a module that it makes, which then counts: a linear map is a matrix for Muon
in a layer and none in a head. torch's own modules have theirs from `TORCH`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from torch import nn

from kmixer.errors import InputError

# Of Koneko's optimiser with a learning rate for each.
Group = Literal["core", "bias", "norm", "embedding", "logit"]


@dataclass(frozen=True)
class Matrix:
    """A matrix from channels to channels, which Muon orthogonalises.

    outputs: the axis of what comes out: 0 as torch keeps linear maps, (out, in); 1 for x W, (in, out).
    parts: how many matrices stand side by side along that axis, of equal size; each is orthogonalised by itself.
    """

    outputs: Literal[0, 1] = 0
    parts: int = 1


@dataclass(frozen=True)
class Role:
    """What an optimiser does with a parameter; see `kmixer.training.optimizers`."""

    group: Group
    decays: bool  # takes weight decay where it does not go by the group
    matrix: Matrix | None = None  # None: Muon leaves it to AdamW


MATRIX = Role("core", decays=True, matrix=Matrix())
TRANSPOSED_MATRIX = Role("core", decays=True, matrix=Matrix(outputs=1))
# Several axes, and not from channels to channels of a layer: maps into or out of the stack, filters, positions.
TABLE = Role("core", decays=True)
VECTOR = Role("core", decays=False)
BIAS = Role("bias", decays=False)
NORM = Role("norm", decays=False)
EMBEDDING = Role("embedding", decays=True)
# Numbers whose sigmoid, softmax or exponential is used, and scales of whole streams.
LOGIT = Role("logit", decays=False)


@runtime_checkable
class HasRoles(Protocol):
    """A module that says the roles of its parameters, and of any inside it."""

    def roles(self) -> dict[str, Role]:
        """A role for each name."""


def linear_roles(layer: nn.Linear, matrix: Role = MATRIX) -> dict[str, Role]:
    """The roles of a linear map whose matrix has this one."""
    return {"weight": matrix} | ({} if layer.bias is None else {"bias": BIAS})


def _layer_norm_roles(layer: nn.LayerNorm) -> dict[str, Role]:
    roles = {"weight": NORM, "bias": BIAS}
    return {name: role for name, role in roles.items() if getattr(layer, name) is not None}


# Of exactly these types, not of classes derived from them.
TORCH: dict[type[nn.Module], Callable[..., dict[str, Role]]] = {
    nn.Embedding: lambda layer: {"weight": EMBEDDING},
    nn.LayerNorm: _layer_norm_roles,
    nn.Linear: linear_roles,
}


def roles_of(model: nn.Module) -> dict[str, Role]:
    """The role of every parameter of a model, in the order of `named_parameters`.

    Raises InputError naming the first parameter without a role, or a role without a parameter.
    """
    said: dict[str, Role] = {}
    for path, module in model.named_modules():  # what is around comes first, and counts
        prefix = f"{path}." if path else ""
        own = _said_by(module)
        if own.keys() - dict(module.named_parameters()).keys():
            unknown = min(own.keys() - dict(module.named_parameters()).keys())
            raise InputError(f"{type(module).__name__}.roles() says a role for {unknown}, which is no parameter of it")
        for name, role in own.items():
            said.setdefault(prefix + name, role)
    roles = {}
    for name, _ in model.named_parameters():
        if name not in said:
            path, _, last = name.rpartition(".")
            owner = type(model.get_submodule(path)).__name__
            raise InputError(f"parameter {name}: no role is said for it; {owner}.roles() must name {last}")
        roles[name] = said[name]
    return roles


def _said_by(module: nn.Module) -> dict[str, Role]:
    if isinstance(module, HasRoles):
        return module.roles()
    return TORCH[type(module)](module) if type(module) in TORCH else {}
