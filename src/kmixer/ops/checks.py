"""What every public operator asks of its tensors before it computes: real floats, all on one device."""

from __future__ import annotations

import torch
from torch import Tensor

from kmixer.errors import InputError

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_tensors(operator: str, **tensors: Tensor | None) -> None:
    """Raises InputError, naming what was given, unless the tensors are real floats on one device; None is left out."""
    devices = {x.device for x in tensors.values() if x is not None}
    if len(devices) > 1:
        given = ", ".join(f"{name} on {x.device}" for name, x in tensors.items() if x is not None)
        raise InputError(f"{operator}: got {given}; all tensors are on one device")
    for name, x in tensors.items():
        if x is not None and x.dtype not in FLOATS:
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS)
            raise InputError(f"{operator}: got {name} in {str(x.dtype).removeprefix('torch.')}; allowed: {allowed}")
