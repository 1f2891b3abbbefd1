"""Which parts a language model must be made of so that code may read its weights in the place of calling it.

What works with the weights of a model (prepared decoding, an export) knows what a part computes by its type alone.
The tables below list, for every such type, the parts it has and the types that each may be of, exactly: a model with
anything else somewhere, a subclass, another norm or activation, a hook or a part more, runs by its modules.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from kmixer.layers import (
    K0,
    K1,
    K2,
    BaseKernel,
    FastWeights,
    FeedForward,
    GaussianAttention,
    K2Mixer,
    SoftmaxAttention,
    SquaredReluFeedForward,
)
from kmixer.layers.block import Block
from kmixer.layers.copy_memory import CopyMemory
from kmixer.layers.exactly import exactly
from kmixer.layers.k_operators import K1Mixer
from kmixer.layers.linear import Linear
from kmixer.layers.norms import Derf, DyT, RMSNorm, UnweightedRMSNorm
from kmixer.layers.pointer import Pointer
from kmixer.models.causal_lm import CausalLM
from kmixer.models.heads import AdaptiveHead, GeluHead, LinearHead, UntiedHead
from kmixer.models.k_stack import KStack
from kmixer.models.transformer import Transformer

# Of a type: its parts by name, and the types that each may have. "*" is every member of a list.
Parts = Mapping[type[nn.Module], Mapping[str, tuple[type[nn.Module], ...]]]

_NORMS = (RMSNorm, DyT, Derf)
_BLOCK = {"mixing_norm": _NORMS, "feed_forward_norm": _NORMS, "feed_forward": (FeedForward,)}

_K2_MIXER = {"base_kernel": (BaseKernel,), "output_gate": (Linear,), "projection": (Linear,)}
_AROUND: Parts = {
    CausalLM: {
        "embedding": (nn.Embedding,),
        "from_embedding": (Linear, nn.Identity),
        "copy_memory": (CopyMemory,),
        "pointer": (Pointer,),
        "norm": _NORMS,
    },
    CopyMemory: {"table": (nn.Embedding,), "from_table": (Linear, nn.Identity)},
    K2Mixer: _K2_MIXER,
    BaseKernel: {"weights": (nn.ParameterList,)},
    FeedForward: {"up": (Linear,), "down": (Linear,)},
    LinearHead: {"to_embedding": (Linear, nn.Identity)},
    UntiedHead: {"to_logits": (Linear,)},
    GeluHead: {"norm": _NORMS, "up": (Linear,), "down": (Linear,)},
    AdaptiveHead: {"softmax": (nn.AdaptiveLogSoftmaxWithLoss,)},
}

# The parts of a language model around a K-stack, but for its head.
K_STACK: Parts = {
    **_AROUND,
    KStack: {
        "first": (K1,),
        "blocks": (nn.ModuleList,),
        "last": (K1,),
        "read_out": (K0,),
        "shared_kernel": (BaseKernel,),
    },
    nn.ModuleList: {"*": (K2,)},
    K1: {**_BLOCK, "mixer": (K1Mixer,)},
    K1Mixer: {"projection": (Linear,)},
    K2: {**_BLOCK, "mixer": (K2Mixer,)},
    K0: {"norm": _NORMS},
}
# The same for what knows fast weights too.
ADAPTING_K_STACK: Parts = {**K_STACK, FeedForward: {**K_STACK[FeedForward], "fast": (FastWeights,)}}

_ANY_NORM = (*_NORMS, UnweightedRMSNorm)
_ADAPTING = {"up": (Linear,), "down": (Linear,), "fast": (FastWeights,)}
# The parts of a language model around a transformer, but for its head, with fast weights.
TRANSFORMER: Parts = {
    **_AROUND,
    CausalLM: {**_AROUND[CausalLM], "norm": _ANY_NORM},
    Transformer: {
        "blocks": (nn.ModuleList,),
        "input_norm": (*_ANY_NORM, nn.Identity),
        "value_embeddings": (nn.ModuleDict,),
    },
    nn.ModuleList: {"*": (Block,)},
    nn.ModuleDict: {"*": (nn.Embedding,)},
    Block: {
        "mixing_norm": _ANY_NORM,
        "mixer": (K2Mixer, SoftmaxAttention, GaussianAttention),
        "feed_forward_norm": _ANY_NORM,
        "feed_forward": (FeedForward, SquaredReluFeedForward),
    },
    SoftmaxAttention: {"query_key_value": (Linear,), "gate": (Linear,), "out": (Linear,)},
    GaussianAttention: {"out": (Linear,)},
    FeedForward: _ADAPTING,
    SquaredReluFeedForward: _ADAPTING,
}


def unknown_part(model: CausalLM, heads: tuple[type[nn.Module], ...], *known: Parts) -> str | None:
    """Name and type of the first part that is not exactly one that the caller knows; None where all are.

    Args:
        model: the language model. A subclass counts as the model where it keeps its `forward`: it is called by it.
        heads: types of heads that the caller knows.
        known: the parts of all other types, for each stack that the caller knows.
    """
    if type(model).forward is not CausalLM.forward or not exactly(model, type(model)):
        return f"the model itself ({type(model).__name__})"
    stacks = {stack: table for table in known for stack in (KStack, Transformer) if stack in table}
    table = stacks.get(type(model.stack), known[0])
    around: dict[str, tuple[type[nn.Module], ...]] = {**table[CausalLM], "stack": tuple(stacks), "head": heads}
    return next(_unknown(model, "", around, table), None)


def _unknown(
    module: nn.Module, path: str, parts: Mapping[str, tuple[type[nn.Module], ...]], known: Parts
) -> Iterator[str]:
    for name, part in module._modules.items():  # named_children leaves out a part that stands in two places
        inside = f"{path}.{name}" if path else name
        allowed = parts.get(name) or parts.get("*") or ()
        if part is None:
            continue
        if not exactly(part, *allowed):
            yield f"{inside} ({_described(part, allowed)})"
        elif type(part) is not nn.AdaptiveLogSoftmaxWithLoss:  # torch's own, which is called
            yield from _unknown(part, inside, known.get(type(part), {}), known)
    for name, parameter in module._parameters.items():
        if parameter is not None and type(parameter) is not nn.Parameter:
            yield f"{path}.{name} ({type(parameter).__name__})"


def _described(part: nn.Module, allowed: tuple[type[nn.Module], ...]) -> str:
    """Its type, and that it was changed where the type alone is one of the allowed."""
    return f"{type(part).__name__}, with hooks or another forward" if type(part) in allowed else type(part).__name__
