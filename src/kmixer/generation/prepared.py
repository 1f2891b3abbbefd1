"""A prepared decoding step: the whole model in one compiled call, its state updated in place.

For float32 K-Stacks on a CPU whose base kernel streams and whose head is linear or gelu. `CausalLM` is
the definition; the prepared step agrees with it to rounding.
"""

from __future__ import annotations

import ctypes
from typing import Any, cast

import torch
from torch import Tensor

from kmixer import native
from kmixer.errors import InputError
from kmixer.layers import K0, K1, K2, BaseKernel, BlockState, FeedForward, K2Mixer, K2State
from kmixer.layers.norms import NORM_EPS
from kmixer.models.causal_lm import CausalLM, check_tokens
from kmixer.models.heads import GeluHead, LinearHead
from kmixer.models.k_stack import KStack, KStackState
from kmixer.models.known_parts import unknown_part
from kmixer.state import State, batch_of, check_state

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


def why_not_prepared(model: CausalLM) -> str | None:
    """What a prepared decoder cannot do of this model on this machine; None where it can do all.

    An allow-list: every part is exactly of a type whose operations are known, and the rest of what it computes is too.
    """
    stack, head = model.stack, model.head
    if part := unknown_part(model, (LinearHead, GeluHead)):
        return f"{part} is none of the parts it knows"
    assert isinstance(stack, KStack)
    if isinstance(head, LinearHead) and head.soft_cap is not None:
        return "head has a soft cap"
    for name, kernel in model.named_modules():
        if isinstance(kernel, BaseKernel) and kernel.kind not in ("toeplitz", "conv"):
            return f"{name} is a {kernel.kind} base kernel, which ends"
    if any(isinstance(mixer, K2Mixer) and _biased(mixer.output_gate) for mixer in model.modules()):
        return "an output gate has a bias"
    if model.training:
        return "the model is in training mode"
    if not native.usable(*model.parameters()):
        return "the compiled kernels were not built, or the model is not on a CPU"
    if any(parameter.dtype != torch.float32 for parameter in model.parameters()):
        return "its weights are not float32"
    return None


def can_prepare(model: CausalLM) -> bool:
    """Whether a prepared decoder exists for this model on this machine."""
    return why_not_prepared(model) is None


class PreparedDecoder:
    """A `Decoder` that makes a step in one compiled call; see `kmixer.generation.decoder`.

    Weights are taken when it is made: it does not follow later training. n tokens at once are n steps, so that a long
    prompt is faster through the model.

    Args:
        model: a model for which `can_prepare` holds.
        state: where the sequences stand, as the model returned it; copied.

    Raises InputError for another model, and for a state that is not of this one.
    """

    def __init__(self, model: CausalLM, state: State) -> None:
        if problem := why_not_prepared(model):
            raise InputError(f"a prepared decoder cannot take this model: {problem}; use EagerDecoder")
        self.vocabulary_size = model.vocabulary_size
        self._initial = model.initial_state(0)
        self._operations: list[_Operation] = []
        self._tensors: list[Tensor] = []  # keeps alive what the operations point to
        self._widths: list[int] = []  # of the buffers
        self._mixing: list[int] = []  # which operations have a state, in its order
        self._state: list[K2State] = []
        with torch.no_grad():
            self._prepare(model)
        self._program = (_Operation * len(self._operations))(*self._operations)
        self.restore(state)

    def step(self, tokens: Tensor) -> Tensor:
        """Logits (b, v) after one token a row (b,) int64, valid until the next call."""
        numbers = tokens.tolist() if tokens.dtype == torch.int64 and tokens.ndim == 1 else []
        if len(numbers) != self.rows:
            raise InputError(
                f"tokens: got {tuple(tokens.shape)} {tokens.dtype}; allowed: torch.int64, one or more for each of the "
                f"{self.rows} rows of this decoder's state"
            )
        if numbers and not 0 <= min(numbers) <= max(numbers) < self.vocabulary_size:
            check_tokens(tokens[:, None].cpu(), self.vocabulary_size)
        self._tokens[:] = numbers
        self._step(*self._arguments)
        return self._logits

    def advance(self, tokens: Tensor) -> Tensor:
        """Logits (b, n, v) after each of the tokens (b, n) int64. Where it raises, the sequences stand as before."""
        check_tokens(tokens.cpu(), self.vocabulary_size)
        logits = torch.empty(*tokens.shape, self.vocabulary_size)
        for t in range(tokens.shape[1]):
            logits[:, t] = self.step(tokens[:, t])
        return logits

    def state(self) -> KStackState:
        """Where the sequences stand; a snapshot, as the model takes it."""

        def copy(state: K2State) -> BlockState:
            base = state.base.clone() if isinstance(state.base, Tensor) else None
            return BlockState(cast("State", K2State(state.decay.clone(), base)))

        nothing = BlockState(None)  # of a K1
        blocks = [copy(state) for state in self._state]
        layers = len(blocks) // self._passes
        passes = (blocks[first : first + layers] for first in range(0, len(blocks), layers))
        return tuple((nothing, *of_pass, nothing) for of_pass in passes)

    def restore(self, state: State) -> None:
        """Stand where the state says, of any number of rows; it is copied. Raises InputError for another model's."""
        rows = batch_of(state)
        check_state(state, self._initial, rows)
        passes = cast("KStackState", state)
        self._state = [_owned(_k2_state(block)) for blocks in passes for block in blocks[1:-1]]
        for index, layer in zip(self._mixing, self._state, strict=True):
            self._program[index].state = layer.decay.data_ptr()
            self._program[index].history = layer.base.data_ptr() if isinstance(layer.base, Tensor) else None
        self.rows = rows
        self._buffers = [torch.zeros(rows, width) for width in self._widths]
        self._logits = self._buffers[self._logits_buffer]
        self._tokens = (ctypes.c_int64 * rows)()
        self._addresses = native.addresses(self._buffers)
        self._strides = (ctypes.c_int64 * len(self._buffers))(*self._widths)
        library = native.kernels()
        assert library is not None
        assert library.operation_size() == ctypes.sizeof(_Operation)
        self._step = library.decode_step
        self._arguments = (
            self._program,
            ctypes.c_int64(len(self._operations)),
            self._tokens,
            self._addresses,
            self._strides,
            ctypes.c_int64(rows),
            ctypes.c_int64(max(1, min(torch.get_num_threads(), rows // ROWS_PER_THREAD))),
        )

    # --- the list of operations --------------------------------------------------------------

    def _prepare(self, model: CausalLM) -> None:
        stack = model.stack
        assert isinstance(stack, KStack)
        self._passes = stack.passes
        width = len(stack.read_out.gain)
        blocks = [block for block in stack.blocks if isinstance(block, K2)]
        inner_layers = [stack.first.feed_forward, *(block.feed_forward for block in blocks), stack.last.feed_forward]
        inner_widths = [len(layer.up.weight) for layer in inner_layers]
        if isinstance(model.head, GeluHead):
            inner_widths.append(len(model.head.up.weight))
        hidden, normed, queries, mixed, inner, refined = (
            self._buffer(width),
            self._buffer(width),
            self._buffer(2 * max((block.mixer.query.shape[1] for block in blocks), default=0)),
            self._buffer(width),
            self._buffer(max(inner_widths)),
            self._buffer(width),
        )
        table = model.embedding.weight
        if isinstance(model.from_embedding, torch.nn.Linear):
            table = model.from_embedding(table)  # one look-up instead of a look-up and a product
        self._add(EMBED, output=hidden, inputs=width, weight=table)
        for _ in range(stack.passes):
            target = refined if stack.refined else hidden
            self._k1(stack.first, hidden, target, normed, inner)
            for block in blocks:
                kernel = block.mixer._kernel(stack.shared_kernel)
                self._k2(block, kernel, target, normed, queries, mixed, inner)
            self._k1(stack.last, target, target, normed, inner)
            self._k0(stack.read_out, target)
            if stack.refined:
                self._add(REFINE, refined, hidden, inputs=width, extra=stack.eta().reshape(1))
        self._add(NORM, hidden, normed, inputs=width, weight=model.norm.weight, eps=NORM_EPS)
        self._logits_buffer = self._head(model, normed, mixed, inner)

    def _head(self, model: CausalLM, normed: int, spare: int, inner: int) -> int:
        logits = self._buffer(model.vocabulary_size)
        head = model.head
        if isinstance(head, GeluHead):
            self._add(NORM, normed, spare, inputs=len(head.norm.weight), weight=head.norm.weight, eps=NORM_EPS)
            self._linear(spare, inner, head.up.weight, head.up.bias, activation=GELU)
            self._linear(inner, logits, head.down.weight, head.down.bias)
            return logits
        weight, bias = model.embedding.weight, None
        if isinstance(head.to_embedding, torch.nn.Linear):
            bias = None if head.to_embedding.bias is None else weight @ head.to_embedding.bias
            weight = weight @ head.to_embedding.weight
        self._linear(normed, logits, weight, bias)
        return logits

    def _k1(self, layer: K1, source: int, target: int, normed: int, inner: int) -> None:
        self._norm(source, normed, layer.mixing_norm.weight)
        projection = layer.mixer.projection
        self._linear(normed, target, projection.weight, projection.bias, residual=source)
        self._feed_forward(layer.feed_forward_norm.weight, layer.feed_forward, target, normed, inner)

    def _k2(
        self, layer: K2, kernel: BaseKernel | None, hidden: int, normed: int, queries: int, mixed: int, inner: int
    ) -> None:
        mixer = layer.mixer
        self._norm(hidden, normed, layer.mixing_norm.weight)
        self._linear(normed, queries, torch.cat([mixer.query, mixer.key], dim=1).T)
        lags, base = 0, None
        if kernel is not None:
            assert mixer.gate_logit is not None
            base = torch.sigmoid(mixer.gate_logit) * kernel.weights[0]
            lags = len(base)
        self._mixing.append(len(self._operations))
        self._add(
            MIX,
            normed,
            mixed,
            inputs=mixer.query.shape[0],
            weight=mixer.decay(),
            bias=mixer.alpha().expand(mixer.query.shape[1]),
            extra=base,
            rank=mixer.query.shape[1],
            lags=lags,
            queries=queries,
            eps=NORM_EPS,
        )
        if mixer.output_gate is not None:
            self._linear(normed, mixed, mixer.output_gate.weight, activation=GATE)
        self._linear(mixed, hidden, mixer.projection.weight, mixer.projection.bias, residual=hidden)
        self._feed_forward(layer.feed_forward_norm.weight, layer.feed_forward, hidden, normed, inner)

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
        if bias is None and (activation == GELU or residual >= 0):  # which read one
            bias = weight.new_zeros(outputs)
        padded = weight.new_zeros(inputs, (-(-outputs // LANES) + 1) * LANES)  # stride_of in gemm.h
        padded[:, :outputs] = weight.T
        options = {"activation": activation, "residual": residual}
        self._add(LINEAR, source, target, inputs=inputs, outputs=outputs, weight=padded, bias=bias, **options)

    def _buffer(self, width: int) -> int:
        self._widths.append(width)
        return len(self._widths) - 1

    def _add(self, kind: int, input: int = 0, output: int = 0, **fields: Any) -> None:
        inputs, written = fields["inputs"], fields.get("outputs", fields["inputs"])
        if written > self._widths[output] or (kind != EMBED and inputs > self._widths[input]):
            raise InputError(f"the weights of this model do not fit each other: {inputs} to {written} channels")
        for name, value in fields.items():
            if isinstance(value, Tensor):
                kept = value.detach().contiguous()
                self._tensors.append(kept)
                fields[name] = kept.data_ptr()
        self._operations.append(_Operation(kind=kind, input=input, output=output, **fields))


def _k2_state(state: BlockState) -> K2State:
    assert isinstance(state.mixer, K2State)
    return state.mixer


def _owned(state: K2State) -> K2State:
    """A copy in float32, as the compiled step reads and overwrites it."""
    base = state.base
    assert not isinstance(base, tuple)
    copy = state.decay.to(torch.float32, copy=True).contiguous()
    return K2State(copy, None if base is None else base.to(torch.float32, copy=True).contiguous())


def _biased(layer: torch.nn.Linear | None) -> bool:
    return layer is not None and layer.bias is not None
