"""A model in evaluation mode for a while, and without torch.compile."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """For the time of the block dropout is off; the mode is afterwards what it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def eagerly(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """For the time of the block what was compiled runs as it is written: hooks would make torch translate it again."""
    compiled = any(part._compiled_call_impl is not None for part in model.modules())
    return torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
