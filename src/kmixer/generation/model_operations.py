"""The operations of a whole language model: what enters, the blocks of its stack, its head, its copy memory."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from kmixer.errors import InputError
from kmixer.generation import layer_operations as layers
from kmixer.generation.operations import CAP, EMBED, GELU, POINT, REFINE, REMEMBER, WEIGH, Place, Program
from kmixer.layers import FastWeights
from kmixer.layers.block import Block
from kmixer.layers.copy_memory import BUCKET_STARTS, CopyMemory
from kmixer.layers.pointer import Pointer
from kmixer.models.causal_lm import CausalLM, DecodedIn
from kmixer.models.heads import GeluHead, LinearHead, UntiedHead
from kmixer.models.k_stack import KStack
from kmixer.models.transformer import Transformer


@torch.no_grad()
def model_program(model: CausalLM, precision: DecodedIn = "float32") -> Program:
    """The program of one step of a model, from tokens to logits.

    Args:
        model: one for which `why_no_operations` has no objection.
        precision: of the matrices of linear maps.

    Raises InputError for weights that do not fit each other.
    """
    program = Program(precision)
    hidden, width = program.buffer(model.config.width), model.config.width
    table = model.entering(model.embedding.weight)  # one look-up instead of a look-up and a product
    program.add(EMBED, output=hidden, inputs=width, weight=table)
    copies: dict[int, Tensor] = {}
    place = Place(width)
    if model.copy_memory is not None:
        place = place._replace(vector=_remember(program, model.copy_memory, width, model.vocabulary_size))
        gates = model.copy_memory.gates_of_buckets()
        copies = dict(zip(model.copy_memory.layers, gates, strict=True))
    if isinstance(model.stack, KStack):
        _k_stack(program, model.stack, hidden, place, copies)
    else:
        _transformer(program, model.stack, hidden, place, copies)
    normed = program.scratch("normed", width)
    program.norm(hidden, normed, model.norm, width)
    program.logits = program.buffer(model.vocabulary_size)
    _head(program, model, normed)
    if model.pointer is not None and model.copy_memory is not None:
        _point(program, model.pointer, normed)
    return program


def _k_stack(program: Program, stack: KStack, hidden: int, place: Place, copies: dict[int, Tensor]) -> None:
    target = program.buffer(place.width) if stack.refined else hidden
    place = place._replace(source=_source(program, stack, hidden, place.width), shared_kernel=stack.shared_kernel)
    for _ in range(stack.passes):
        layers.k1(program, stack.first, hidden, target, place)
        for index, block in enumerate(stack.blocks):
            layers.block(program, cast("Block", block), target, place._replace(gates=copies.get(index)))
        layers.k1(program, stack.last, target, target, place)
        layers.k0(program, stack.read_out, target)
        if stack.refined:
            program.add(REFINE, target, hidden, inputs=place.width, extra=stack.eta().reshape(1))


def _transformer(program: Program, stack: Transformer, hidden: int, place: Place, copies: dict[int, Tensor]) -> None:
    width, first = place.width, -1
    if stack.stream_scale is not None and stack.input_scale is not None:
        first = program.buffer(width)
        scales = torch.stack([stack.stream_scale, stack.input_scale], dim=1)
        program.norm(hidden, first, stack.input_norm, width)
        program.norm(hidden, hidden, stack.input_norm, width)
    place = place._replace(source=_source(program, stack, hidden, width))
    for index, block in enumerate(stack.blocks):
        if first >= 0:
            program.add(WEIGH, first, hidden, inputs=width, extra=scales[index])
        key = str(index)
        table = cast("nn.Embedding", stack.value_embeddings[key]).weight if key in stack.value_embeddings else None
        layers.block(program, cast("Block", block), hidden, place._replace(gates=copies.get(index), table=table))


def _source(program: Program, stack: nn.Module, hidden: int, width: int) -> int:
    """The buffer of what fast weights learn from, of what enters the stack; -1 where none do."""
    if not any(isinstance(part, FastWeights) and part.source == "embed" for part in stack.modules()):
        return -1
    source = program.buffer(width)
    program.rms_norm(hidden, source, torch.ones(width))
    return source


def _head(program: Program, model: CausalLM, normed: int) -> None:
    head, logits = model.head, program.logits
    if isinstance(head, GeluHead):
        inner, width = program.scratch("inner", len(head.up.weight)), model.config.width
        spare = program.scratch("mixed", width)
        program.norm(normed, spare, head.norm, width)
        program.linear(spare, inner, head.up.weight, head.up.bias, activation=GELU)
        program.linear(inner, logits, head.down.weight, head.down.bias)
        return
    if isinstance(head, UntiedHead):
        program.linear(normed, logits, head.to_logits.weight, head.to_logits.bias)
    else:
        assert isinstance(head, LinearHead)
        weight, bias = model.embedding.weight, None
        if isinstance(head.to_embedding, nn.Linear):
            bias = None if head.to_embedding.bias is None else weight @ head.to_embedding.bias
            weight = weight @ head.to_embedding.weight
        program.linear(normed, logits, weight, bias)
    if head.soft_cap is not None:
        cap = torch.tensor([head.soft_cap], dtype=torch.float32)
        program.add(CAP, logits, logits, inputs=model.vocabulary_size, extra=cap)


def _remember(program: Program, memory: CopyMemory, width: int, vocabulary_size: int) -> int:
    """The buffer of the vectors of copied tokens, without gates."""
    table = memory.from_table(memory.table.weight)
    if table.shape != (vocabulary_size + 1, width):
        raise InputError(
            f"the weights of this model do not fit each other: copies {tuple(table.shape)} for {vocabulary_size} "
            f"tokens and {width} channels"
        )
    vector = program.buffer(width)
    starts = torch.tensor(BUCKET_STARTS, dtype=torch.float32)
    tensors = {"weight": table, "bias": memory.length_vector, "extra": starts}
    program.match(REMEMBER, 0, vector, inputs=width, rank=len(starts), **tensors)
    return vector


def _point(program: Program, pointer: Pointer, hidden: int) -> None:
    logits = program.logits
    tensors = {"weight": pointer.direction, "bias": pointer.length_logit}
    outputs = program.widths[logits]
    program.match(POINT, hidden, logits, inputs=len(pointer.direction), outputs=outputs, **tensors)
