"""Whether a module is exactly what it seems: the one question by which fast paths are chosen."""

from __future__ import annotations

from typing import TypeGuard, TypeVar, overload

from torch import nn
from torch.nn.modules import module as of_all_modules

One = TypeVar("One", bound=nn.Module)
Other = TypeVar("Other", bound=nn.Module)


@overload
def exactly(module: nn.Module | None, one: type[One], /) -> TypeGuard[One]: ...
@overload
def exactly(module: nn.Module | None, one: type[One], other: type[Other], /) -> TypeGuard[One | Other]: ...
@overload
def exactly(module: nn.Module | None, /, *types: type[nn.Module]) -> bool: ...
def exactly(module: nn.Module | None, /, *types: type[nn.Module]) -> bool:
    """Whether calling the module gives what its type says, so that code may read its weights instead of calling it.

    False for a subclass, which may compute something else; for a module with hooks, which would not run; and for one
    whose `forward` was replaced. torch's parametrizations and wrappers of adapters make modules of other types.
    """
    if type(module) not in types:
        return False
    own = vars(module)
    return not (
        "forward" in own
        or own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or of_all_modules._has_any_global_hook()
    )
