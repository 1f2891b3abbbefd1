"""Whether a compiled kernel may take some tensors: the one question that every fast path on a CPU asks.

An allow-list. A kernel reads memory: it may have tensors whose numbers lie there as they are, in a dtype that it knows,
and only where nobody follows what is computed but autograd's backward. Everything else goes the plain way, through
torch's own operators, which know what to do: other devices, subclasses, tensors without data (meta, fake), sparse and
quantised ones, views that stand for negated numbers, torch.func (grad, vmap, jvp), derivatives in forward mode,
dispatch modes, torch.jit.trace, torch.compile and torch.export. What autocast would compute in another precision
(matrix products) goes that way too.
"""

from __future__ import annotations

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from kmixer.native.library import kernels, processor_has

FLOAT32 = (torch.float32,)
# What the elementwise kernels know: autocast hands them the products of linear maps in bfloat16.
ELEMENTS = (torch.float32, torch.bfloat16)
# Where the processor has tiles for products of bfloat16 (AMX), torch's library is faster with more weights than this.
MAX_WEIGHTS_BESIDE_TILES = 1 << 13
TILES = processor_has("amx_bf16")


# These are asked several times for every operator of a small layer: looked up once.
_keys = torch._C._dispatch_keys  # what the dispatcher goes by: device, layout, wrappers, views that stand for others
_transforms = torch._C._are_functorch_transforms_active
_modes = torch._C._len_torch_dispatch_stack
_trace = torch._C._get_tracing_state


def _plain_keys() -> frozenset[int]:
    """The keys of ordinary tensors on a CPU, read off two of them."""
    with torch.inference_mode():
        inference = _keys(torch.empty(0, device="cpu")).raw_repr()
    with torch.inference_mode(False):
        return frozenset({_keys(torch.empty(0, device="cpu")).raw_repr(), inference})


_PLAIN = _plain_keys()
_TYPES = (Tensor, torch.nn.Parameter)


def transformed(*tensors: Tensor | None) -> bool:
    """Whether torch.func (grad, vmap, jvp) is at work, or a tensor has a tangent of a derivative in forward mode.

    A hand-written backward, and a custom operator of torch, has no part in these. torch.compile sees to it itself.
    """
    if torch.compiler.is_compiling():
        return False
    if _transforms():
        return True
    level = forward_ad._current_level
    return level >= 0 and any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def plain(*tensors: Tensor) -> bool:
    """Whether these are ordinary tensors on a CPU whose numbers can be read, outside all that follows."""
    if torch.compiler.is_compiling():
        return False
    for x in tensors:
        if type(x) not in _TYPES or _keys(x).raw_repr() not in _PLAIN:
            return False
    # A dispatch mode or torch.jit.trace sees every operator: it would not see what a kernel writes.
    if _transforms() or _modes() or _trace() is not None:
        return False
    return forward_ad._current_level < 0 or not transformed(*tensors)


def product_dtype() -> torch.dtype:
    """In which matrix products of float32 weights are computed on a CPU: float32, or what autocast says."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32


def multiplies(x: Tensor, *weights: Tensor) -> bool:
    """Whether the compiled kernels can make products of x and weights that stay float32, as autocast would make them.

    In bfloat16 both are rounded to it, and sums are float32; `x` has 16 bits already.
    """
    dtype = product_dtype()
    if dtype is torch.bfloat16 and TILES and any(weight.numel() > MAX_WEIGHTS_BESIDE_TILES for weight in weights):
        return False
    return dtype in ELEMENTS and usable(x, dtypes=(dtype,)) and usable(*weights)


def usable(
    *tensors: Tensor,
    dtypes: tuple[torch.dtype, ...] = FLOAT32,
    products: bool = False,
    operator: bool = False,
) -> bool:
    """Whether the compiled kernels can take these tensors, here and now.

    Args:
        dtypes: those that the kernel knows.
        products: the kernel is, or replaces, a matrix product, which autocast computes in another precision.
        operator: the kernel is a custom operator of torch, which torch.compile can hold; torch.export cannot.
    """
    if kernels() is None:
        return False
    compiling = torch.compiler.is_compiling()
    if operator or compiling:
        # Torch's dispatcher sees to what an operator of its own is given. To torch 2.11, what torch.compile traces is
        # being exported too.
        exporting = torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()
        return operator and not exporting and all(x.device.type == "cpu" and x.dtype in dtypes for x in tensors)
    for x in tensors:
        if x.dtype not in dtypes:
            return False
    if not plain(*tensors):
        return False
    # Of autocast's dtypes the elementwise kernels know bfloat16 only.
    return not torch.is_autocast_enabled("cpu") or not (
        products or torch.get_autocast_dtype("cpu") is not torch.bfloat16
    )
