"""A prepared decoding step: the whole model in one compiled call, its state updated in place.

For float32 K-Stacks on a CPU whose base kernel streams and whose head is linear or gelu. `CausalLM` is
the definition; the prepared step agrees with it to rounding.
"""

from __future__ import annotations

import ctypes
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kmixer import native
from kmixer.layers import K0, K1, K2, BlockState, FeedForward, K2State
from kmixer.layers.norms import NORM_EPS
from kmixer.models.causal_lm import CausalLM
from kmixer.models.heads import GeluHead, LinearHead
from kmixer.models.k_stack import KStack, KStackState, ModelConfig
from kmixer.state import State

LANES = 16  # kPadding in native/common.h
EMBED, LINEAR, NORM, MIX, READ_OUT, REFINE = range(6)
NONE, GELU, GATE = range(3)
# Threads cost more than they save below this many rows each.
ROWS_PER_THREAD = 16


class _Operation(ctypes.Structure):
    """`Operation` in native/decode.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("kind", "input", "output", "inputs", "outputs")),
        *((name, ctypes.c_int64) for name in ("activation", "residual")),
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "extra", "state", "history")),
        *((name, ctypes.c_int64) for name in ("rank", "lags", "queries")),
        ("eps", ctypes.c_float),
        ("unused", ctypes.c_float),
    )


def can_prepare(model: CausalLM) -> bool:
    """Whether a prepared step exists for this model on this machine."""
    return (
        isinstance(model.stack, KStack)
        and native.usable(*model.parameters())
        and all(p.dtype == torch.float32 for p in model.parameters())
        and model.config.max_positions is None
        and isinstance(model.head, LinearHead | GeluHead)
        and not (isinstance(model.head, LinearHead) and model.head.soft_cap is not None)
    )


class DecodingStep:
    """Calls of `step(tokens)` advance `batch_size` sequences by one token each.

    Weights are copied when the step is prepared: it does not follow later training.

    Args:
        model: a model for which `can_prepare` holds.
        state: where the sequences stand, as the model returned it; copied.
    """

    def __init__(self, model: CausalLM, state: KStackState) -> None:
        self.rows = _k2_state(state[0][1]).decay.shape[0]
        self.vocabulary_size = model.vocabulary_size
        self._operations: list[_Operation] = []
        self._tensors: list[Tensor] = []  # keeps alive what the operations point to
        self._buffers: list[Tensor] = []
        self._state: list[list[K2State]] = []
        with torch.no_grad():
            self._prepare(model, state)
        library = native.kernels()
        assert library is not None
        assert library.operation_size() == ctypes.sizeof(_Operation)
        self._program = (_Operation * len(self._operations))(*self._operations)
        self._addresses = (ctypes.c_void_p * len(self._buffers))(*(b.data_ptr() for b in self._buffers))
        self._strides = (ctypes.c_int64 * len(self._buffers))(*(b.shape[1] for b in self._buffers))
        self._tokens = torch.zeros(self.rows, dtype=torch.int64)
        self._threads = max(1, min(torch.get_num_threads(), self.rows // ROWS_PER_THREAD))
        self._step = library.decode_step
        self._arguments = (
            self._program,
            ctypes.c_int64(len(self._operations)),
            ctypes.c_void_p(self._tokens.data_ptr()),
            self._addresses,
            self._strides,
            ctypes.c_int64(self.rows),
            ctypes.c_int64(self._threads),
        )

    def __call__(self, tokens: Int[Tensor, " b"]) -> Float[Tensor, "b v"]:
        """Logits of the next token; valid until the next call."""
        self._tokens.copy_(tokens)
        self._step(*self._arguments)
        return self._buffers[self._logits][:, : self.vocabulary_size]

    def state(self) -> KStackState:
        """Where the sequences stand, as the model takes it."""

        def copy(state: K2State) -> BlockState:
            base = state.base.clone() if isinstance(state.base, Tensor) else None
            return BlockState(cast("State", K2State(state.decay.clone(), base)))

        nothing = BlockState(None)  # of a K1
        return tuple((nothing, *(copy(layer) for layer in layers), nothing) for layers in self._state)

    # --- the list of operations --------------------------------------------------------------

    def _prepare(self, model: CausalLM, state: KStackState) -> None:
        stack = model.stack
        assert isinstance(stack, KStack)
        assert isinstance(model.config, ModelConfig)
        width = model.config.width
        hidden, normed, queries, mixed, inner, refined = (
            self._buffer(width),
            self._buffer(width),
            self._buffer(2 * model.config.rank),
            self._buffer(width),
            self._buffer(max(2 * width, model.head.up.out_features if isinstance(model.head, GeluHead) else 0)),
            self._buffer(width),
        )
        table = model.embedding.weight
        if isinstance(model.from_embedding, torch.nn.Linear):
            table = model.from_embedding(table)  # one look-up instead of a look-up and a product
        self._add(EMBED, output=hidden, inputs=width, weight=table)
        for layers in state:
            target = refined if stack.refined else hidden
            self._k1(stack.first, hidden, target, normed, inner)
            kept = []
            for block, block_state in zip(stack.blocks, layers[1:-1], strict=True):
                assert isinstance(block, K2)
                kernel, before = block.mixer.base_kernel or stack.shared_kernel, _k2_state(block_state)
                kept.append(self._k2(block, kernel, before, target, normed, queries, mixed, inner))
            self._state.append(kept)
            self._k1(stack.last, target, target, normed, inner)
            self._k0(stack.read_out, target)
            if stack.refined:
                self._add(REFINE, refined, hidden, inputs=width, extra=stack.eta().reshape(1))
        self._add(NORM, hidden, normed, inputs=width, weight=model.norm.weight, eps=NORM_EPS)
        self._logits = self._head(model, normed, mixed, inner)

    def _head(self, model: CausalLM, normed: int, spare: int, inner: int) -> int:
        logits = self._buffer(model.vocabulary_size)
        head = model.head
        if isinstance(head, GeluHead):
            self._add(NORM, normed, spare, inputs=model.config.width, weight=head.norm.weight, eps=NORM_EPS)
            self._linear(spare, inner, head.up.weight, head.up.bias, activation=GELU)
            self._linear(inner, logits, head.down.weight)
            return logits
        weight = model.embedding.weight
        if isinstance(head.to_embedding, torch.nn.Linear):
            weight = weight @ head.to_embedding.weight
        self._linear(normed, logits, weight)
        return logits

    def _k1(self, layer: K1, source: int, target: int, normed: int, inner: int) -> None:
        self._norm(source, normed, layer.mixing_norm.weight)
        projection = layer.mixer.projection
        self._linear(normed, target, projection.weight, projection.bias, residual=source)
        self._feed_forward(layer.feed_forward_norm.weight, layer.feed_forward, target, normed, inner)

    def _k2(
        self, layer: K2, kernel: Any, state: K2State, hidden: int, normed: int, queries: int, mixed: int, inner: int
    ) -> K2State:
        mixer = layer.mixer
        self._norm(hidden, normed, layer.mixing_norm.weight)
        self._linear(normed, queries, torch.cat([mixer.query, mixer.key], dim=1).T)
        decay = state.decay.contiguous().clone()
        lags, base, history = 0, None, None
        if kernel is not None:
            assert mixer.gate_logit is not None
            assert isinstance(state.base, Tensor)
            base = torch.sigmoid(mixer.gate_logit) * kernel.weights[0]
            history, lags = state.base.contiguous().clone(), len(base)
        self._add(
            MIX,
            normed,
            mixed,
            inputs=mixer.width,
            weight=mixer.decay(),
            bias=mixer.alpha().expand(mixer.rank),
            extra=base,
            state=decay,
            history=history,
            rank=mixer.rank,
            lags=lags,
            queries=queries,
            eps=NORM_EPS,
        )
        if mixer.output_gate is not None:
            self._linear(normed, mixed, mixer.output_gate.weight, activation=GATE)
        self._linear(mixed, hidden, mixer.projection.weight, mixer.projection.bias, residual=hidden)
        self._feed_forward(layer.feed_forward_norm.weight, layer.feed_forward, hidden, normed, inner)
        return K2State(decay, history)

    def _k0(self, layer: K0, hidden: int) -> None:
        width = len(layer.gain)
        tensors = {"weight": layer.norm.weight, "bias": layer.bias, "extra": layer.gain}
        self._add(READ_OUT, hidden, hidden, inputs=width, eps=NORM_EPS, **tensors)

    def _feed_forward(self, norm: Tensor, layer: FeedForward, hidden: int, normed: int, inner: int) -> None:
        self._norm(hidden, normed, norm)
        self._linear(normed, inner, layer.up.weight, layer.up.bias, activation=GELU)
        self._linear(inner, hidden, layer.down.weight, layer.down.bias, residual=hidden)

    def _norm(self, source: int, target: int, weight: Tensor) -> None:
        self._add(NORM, source, target, inputs=len(weight), weight=weight, eps=NORM_EPS)

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
        padded = weight.new_zeros(inputs, (-(-outputs // LANES) + 1) * LANES)  # stride_of in gemm.h
        padded[:, :outputs] = weight.T
        options = {"activation": activation, "residual": residual}
        self._add(LINEAR, source, target, inputs=inputs, outputs=outputs, weight=padded, bias=bias, **options)

    def _buffer(self, width: int) -> int:
        self._buffers.append(torch.zeros(self.rows, width))
        return len(self._buffers) - 1

    def _add(self, kind: int, input: int = 0, output: int = 0, **fields: Any) -> None:
        for name, value in fields.items():
            if isinstance(value, Tensor):
                kept = value.detach().contiguous()
                self._tensors.append(kept)
                fields[name] = kept.data_ptr()
        self._operations.append(_Operation(kind=kind, input=input, output=output, **fields))


def _k2_state(state: BlockState) -> K2State:
    assert isinstance(state.mixer, K2State)
    return state.mixer
