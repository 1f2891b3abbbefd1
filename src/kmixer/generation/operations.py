"""The operations of a prepared decoding step: a language model as a list for native/decode.cpp.

Every operation reads and writes rows of numbered buffers. Weights are folded while the list is made: tables with the
projections behind them, gates and decays with their sigmoids.
"""

from __future__ import annotations

import ctypes
from typing import Any, cast

import torch
from torch import Tensor, nn

from kmixer.errors import InputError
from kmixer.generation.live_weights import LiveWeights
from kmixer.generation.panels import padded, panels, whole
from kmixer.layers import K0, K1, K2, BaseKernel, FastWeights, FeedForward
from kmixer.layers.copy_memory import BUCKET_STARTS, CopyMemory
from kmixer.layers.linear import Linear
from kmixer.layers.norms import NORM_EPS, Derf, DyT, RMSNorm
from kmixer.layers.pointer import Pointer
from kmixer.models.causal_lm import CausalLM
from kmixer.models.heads import GeluHead
from kmixer.models.k_stack import KStack
from kmixer.ops.pointwise_norm import KINDS, Pointwise

LINE = 16
WHOLE = 16  # queries and keys come in as many: wide_rank in native/decode_state.h
EMBED, LINEAR, NORM, MIX, READ_OUT, REFINE, REMEMBER, COPY, POINT, ADAPT, POINTWISE = range(11)
NONE, GELU, GATE = range(3)


class Operation(ctypes.Structure):
    """`Operation` in native/decode_state.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("kind", "input", "output", "inputs", "outputs")),
        *((name, ctypes.c_int64) for name in ("activation", "residual")),
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "extra", "state", "keys")),
        *((name, ctypes.c_int64) for name in ("rank", "lags", "queries", "span")),
        *((name, ctypes.c_void_p) for name in ("automata", "matches")),
        ("words", ctypes.c_int64),
        ("fast", ctypes.c_void_p),
        ("eps", ctypes.c_float),
        ("unused", ctypes.c_float),
    )


class Decoding(ctypes.Structure):
    """`Decoding` in native/decode.cpp."""

    _fields_ = (
        ("operations", ctypes.POINTER(Operation)),
        ("count", ctypes.c_int64),
        ("buffers", ctypes.POINTER(ctypes.c_void_p)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("tokens", ctypes.POINTER(ctypes.c_int64)),
        *((name, ctypes.c_int64) for name in ("rows", "logits", "vocabulary")),
    )


class Operations:
    """The operations of a model, in their order.

    Args:
        model: one for which `can_prepare` holds.

    Raises InputError for weights that do not fit each other.
    """

    def __init__(self, model: CausalLM) -> None:
        self.list: list[Operation] = []
        self.widths: list[int] = []  # of the buffers
        self.mixing: list[int] = []  # which operations mix, in the order of their states
        self.adapting: list[LiveWeights] = []  # the fast weights, in the order of their states
        self.matching: list[int] = []  # which write or read what the rows copy, the one that remembers first
        self._source = -1  # the buffer of what fast weights learn from
        self._tensors: dict[int, Tensor] = {}  # keeps alive what the operations point to, by its address
        with torch.no_grad():
            self.logits = self._prepare(model)  # the number of their buffer
            self._put_in_order()

    def strides(self) -> list[int]:
        """Of the rows of every buffer: whole panels, and one line of memory more, as rows a power of two apart share
        places in a cache; logits are given away as they are."""
        return [width if index == self.logits else whole(width) + LINE for index, width in enumerate(self.widths)]

    def _prepare(self, model: CausalLM) -> int:
        stack = model.stack
        assert isinstance(stack, KStack)
        width = len(stack.read_out.gain)
        blocks = [block for block in stack.blocks if isinstance(block, K2)]
        inner_layers = [stack.first.feed_forward, *(block.feed_forward for block in blocks), stack.last.feed_forward]
        inner_widths = [len(layer.up.weight) for layer in inner_layers]
        if isinstance(model.head, GeluHead):
            inner_widths.append(len(model.head.up.weight))
        hidden, normed, queries, mixed, inner, refined = (
            self._buffer(width),
            self._buffer(width),
            self._buffer(2 * max((whole(block.mixer.query.shape[1], WHOLE) for block in blocks), default=0)),
            self._buffer(width),
            self._buffer(max(inner_widths)),
            self._buffer(width),
        )
        table = model.entering(model.embedding.weight)  # one look-up instead of a look-up and a product
        self._add(EMBED, output=hidden, inputs=width, weight=table)
        if any(layer.fast is not None and layer.fast.source == "embed" for layer in inner_layers):
            self._source = self._buffer(width)
            self._rms_norm(hidden, self._source, table.new_ones(width))
        gates: dict[int, Tensor] = {}
        vector = -1
        if model.copy_memory is not None:
            vector = self._remember(model.copy_memory, width, model.vocabulary_size)
            gates = dict(zip(model.copy_memory.layers, model.copy_memory.gates_of_buckets(), strict=True))
        for _ in range(stack.passes):
            target = refined if stack.refined else hidden
            self._k1(stack.first, hidden, target, normed, inner)
            for index, block in enumerate(blocks):
                kernel = block.mixer._kernel(stack.shared_kernel)
                copying = (vector, gates[index]) if index in gates else None
                self._k2(block, kernel, target, normed, queries, mixed, inner, copying)
            self._k1(stack.last, target, target, normed, inner)
            self._k0(stack.read_out, target)
            if stack.refined:
                self._add(REFINE, refined, hidden, inputs=width, extra=stack.eta().reshape(1))
        self._norm(hidden, normed, model.norm)
        logits = self._head(model, normed, mixed, inner)
        if model.pointer is not None and model.copy_memory is not None:
            self._point(model.pointer, normed, logits)
        return logits

    def _put_in_order(self) -> None:
        """Weights of linear maps one after the other, as they are read: the next are on their way before their turn."""
        linear = [operation for operation in self.list if operation.kind == LINEAR]
        weights = torch.cat([self._tensors.pop(operation.weight).flatten() for operation in linear])
        size, at = weights.element_size(), weights.data_ptr()
        for operation in linear:
            operation.weight = at
            at += size * (operation.inputs + 1) * whole(operation.outputs)
        self._keep(weights)

    def _head(self, model: CausalLM, normed: int, spare: int, inner: int) -> int:
        logits = self._buffer(model.vocabulary_size)
        head = model.head
        if isinstance(head, GeluHead):
            self._norm(normed, spare, head.norm)
            self._linear(spare, inner, head.up.weight, head.up.bias, activation=GELU)
            self._linear(inner, logits, head.down.weight, head.down.bias)
            return logits
        weight, bias = model.embedding.weight, None
        if isinstance(head.to_embedding, nn.Linear):
            bias = None if head.to_embedding.bias is None else weight @ head.to_embedding.bias
            weight = weight @ head.to_embedding.weight
        self._linear(normed, logits, weight, bias)
        return logits

    def _k1(self, layer: K1, source: int, target: int, normed: int, inner: int) -> None:
        self._norm(source, normed, layer.mixing_norm)
        projection = layer.mixer.projection
        self._linear(normed, target, projection.weight, projection.bias, residual=source)
        self._feed_forward(layer.feed_forward_norm, layer.feed_forward, target, normed, inner)

    def _k2(
        self,
        layer: K2,
        kernel: BaseKernel | None,
        hidden: int,
        normed: int,
        queries: int,
        mixed: int,
        inner: int,
        copying: tuple[int, Tensor] | None,
    ) -> None:
        mixer = layer.mixer
        self._norm(hidden, normed, layer.mixing_norm)
        rank = mixer.query.shape[1]
        wide = whole(rank, WHOLE)
        both = torch.cat([padded(mixer.query, wide), padded(mixer.key, wide)], dim=1)
        self._linear(normed, queries, both.T)
        lags, base = 0, None
        if kernel is not None:
            assert mixer.gate_logit is not None
            base = torch.sigmoid(mixer.gate_logit) * kernel.weights[0]
            lags = len(base)
        self.mixing.append(len(self.list))
        self._add(
            MIX,
            normed,
            mixed,
            inputs=mixer.query.shape[0],
            weight=padded(mixer.decay(), wide),
            bias=padded(mixer.alpha().expand(rank), wide),
            extra=base,
            rank=rank,
            lags=lags,
            queries=queries,
            eps=NORM_EPS,
        )
        if copying is not None:
            vector, gates = copying
            self._match(COPY, vector, mixed, inputs=mixer.query.shape[0], weight=gates)
        if mixer.output_gate is not None:
            self._linear(normed, mixed, mixer.output_gate.weight, activation=GATE)
        self._linear(mixed, hidden, mixer.projection.weight, mixer.projection.bias, residual=hidden)
        self._feed_forward(layer.feed_forward_norm, layer.feed_forward, hidden, normed, inner)

    def _k0(self, layer: K0, hidden: int) -> None:
        width = len(layer.gain)
        if isinstance(layer.norm, DyT | Derf):
            self._pointwise(hidden, hidden, layer.joined(layer.norm), residual=hidden)
            return
        tensors = {"weight": cast(RMSNorm, layer.norm).weight, "bias": layer.bias, "extra": layer.gain}
        wide = {name: padded(tensor, whole(width)) for name, tensor in tensors.items()}
        self._add(READ_OUT, hidden, hidden, inputs=width, eps=NORM_EPS, **wide)

    def _feed_forward(self, norm: nn.Module, layer: FeedForward, hidden: int, normed: int, inner: int) -> None:
        self._norm(hidden, normed, norm)
        self._linear(normed, inner, layer.up.weight, layer.up.bias, activation=GELU)
        if layer.fast is not None:
            self._adapt(layer.fast, layer.down, hidden, normed, inner)
        else:
            self._linear(inner, hidden, layer.down.weight, layer.down.bias, residual=hidden)

    def _adapt(self, fast: FastWeights, down: Linear, hidden: int, normed: int, inner: int) -> None:
        outputs, inputs = down.weight.shape
        if (fast.width, fast.hidden_width) != (outputs, inputs):
            raise InputError(
                f"the weights of this model do not fit each other: fast weights {fast.hidden_width} to {fast.width} on "
                f"a matrix {inputs} to {outputs} channels"
            )
        live = LiveWeights(fast, down, normed if fast.source == "hidden" else self._source)
        self.adapting.append(live)
        self._add(ADAPT, inner, hidden, inputs=inputs, outputs=outputs, residual=hidden, fast=live.where)

    def _remember(self, memory: CopyMemory, width: int, vocabulary_size: int) -> int:
        """The buffer of the vectors of copied tokens, without gates."""
        table = memory.from_table(memory.table.weight)
        if table.shape != (vocabulary_size + 1, width):
            raise InputError(
                f"the weights of this model do not fit each other: copies {tuple(table.shape)} for {vocabulary_size} "
                f"tokens and {width} channels"
            )
        vector = self._buffer(width)
        starts = torch.tensor(BUCKET_STARTS, dtype=torch.float32)
        tensors = {"weight": table, "bias": memory.length_vector, "extra": starts}
        self._match(REMEMBER, 0, vector, inputs=width, rank=len(starts), **tensors)
        return vector

    def _point(self, pointer: Pointer, hidden: int, logits: int) -> None:
        tensors = {"weight": pointer.direction, "bias": pointer.length_logit}
        self._match(POINT, hidden, logits, inputs=len(pointer.direction), outputs=self.widths[logits], **tensors)

    def _match(self, kind: int, source: int, target: int, **fields: Any) -> None:
        self.matching.append(len(self.list))
        self._add(kind, source, target, **fields)

    def _norm(self, source: int, target: int, norm: nn.Module) -> None:
        if isinstance(norm, DyT | Derf):
            self._pointwise(source, target, norm.weights())
        else:
            self._rms_norm(source, target, cast(RMSNorm, norm).weight)

    def _pointwise(self, source: int, target: int, norm: Pointwise, residual: int = -1) -> None:
        width = self.widths[target]
        if not norm.fits(width):
            raise InputError(f"the weights of this model do not fit each other: a norm on {width} channels")
        gain, bias, numbers = norm.packed(width).split([width, width, 2])
        wide = {name: padded(tensor, whole(width)) for name, tensor in (("weight", gain), ("bias", bias))}
        options = {"activation": KINDS[norm.function], "residual": residual}
        self._add(POINTWISE, source, target, inputs=width, extra=numbers, **wide, **options)

    def _rms_norm(self, source: int, target: int, weight: Tensor) -> None:
        scale = padded(weight, whole(len(weight)))
        self._add(NORM, source, target, inputs=len(weight), weight=scale, eps=NORM_EPS)

    def _linear(
        self,
        source: int,
        target: int,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        activation: int = NONE,
        residual: int = -1,
    ) -> None:
        outputs, inputs = weight.shape
        options = {"activation": activation, "residual": residual}
        self._add(LINEAR, source, target, inputs=inputs, outputs=outputs, weight=panels(weight, bias), **options)

    def _buffer(self, width: int) -> int:
        self.widths.append(width)
        return len(self.widths) - 1

    def _add(self, kind: int, input: int = 0, output: int = 0, **fields: Any) -> None:
        inputs, written = fields["inputs"], fields.get("outputs", fields["inputs"])
        if written > self.widths[output] or (kind not in (EMBED, REMEMBER) and inputs > self.widths[input]):
            raise InputError(f"the weights of this model do not fit each other: {inputs} to {written} channels")
        for name, value in fields.items():
            if isinstance(value, Tensor):
                fields[name] = self._keep(value.detach().contiguous())
        self.list.append(Operation(kind=kind, input=input, output=output, **fields))

    def _keep(self, tensor: Tensor) -> int:
        """Where it lies, for as long as the operations are there."""
        self._tensors[tensor.data_ptr()] = tensor
        return tensor.data_ptr()
