"""A prepared decoding step: the whole model in one compiled call, its state updated in place.

For float32 K-Stacks on a CPU whose base kernel streams and whose head is linear or gelu. `CausalLM` is
the definition; the prepared step agrees with it to rounding.
"""

from __future__ import annotations

import ctypes
from typing import cast

import torch
from torch import Tensor

from kmixer import native
from kmixer.errors import InputError
from kmixer.generation.live_memory import LiveMemory
from kmixer.generation.operations import Operation, Operations
from kmixer.layers import BaseKernel, BlockState, K2Mixer, K2State
from kmixer.models.causal_lm import CausalLM, RememberingState, check_tokens
from kmixer.models.heads import GeluHead, LinearHead
from kmixer.models.k_stack import KStack, KStackState
from kmixer.models.known_parts import unknown_part
from kmixer.state import State, batch_of, check_state

# Threads cost more than they save below this many rows each.
ROWS_PER_THREAD = 16


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
        self._copy_memory = None if model.copy_memory is None else model.copy_memory.memory
        assert isinstance(model.stack, KStack)
        self._passes = model.stack.passes
        self._operations = Operations(model)
        self._program = (Operation * len(self._operations.list))(*self._operations.list)
        self._state: list[K2State] = []
        self._memory: LiveMemory | None = None
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
        if self._memory is not None and self._memory.count_step():
            self._put_automata(self._memory)
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

    def state(self) -> State:
        """Where the sequences stand; a snapshot, as the model takes it."""

        def copy(state: K2State) -> BlockState:
            base = state.base.clone() if isinstance(state.base, Tensor) else None
            return BlockState(cast("State", K2State(state.decay.clone(), base)))

        nothing = BlockState(None)  # of a K1
        blocks = [copy(state) for state in self._state]
        layers = len(blocks) // self._passes
        passes = (blocks[first : first + layers] for first in range(0, len(blocks), layers))
        stack = tuple((nothing, *of_pass, nothing) for of_pass in passes)
        return cast("State", stack if self._memory is None else RememberingState(stack, self._memory.state()))

    def restore(self, state: State) -> None:
        """Stand where the state says, of any number of rows; it is copied. Raises InputError for another model's."""
        rows = batch_of(state)
        check_state(state, self._initial, rows)
        memory = None
        if isinstance(state, RememberingState):
            state, remembered = state
            check_tokens(remembered.tokens[..., 0], self.vocabulary_size)  # they choose rows of a table
            memory = LiveMemory(remembered, self._copy_memory)
        passes = cast("KStackState", state)
        self._state = [_owned(_k2_state(block)) for blocks in passes for block in blocks[1:-1]]
        for index, layer in zip(self._operations.mixing, self._state, strict=True):
            self._program[index].state = layer.decay.data_ptr()
            self._program[index].history = layer.base.data_ptr() if isinstance(layer.base, Tensor) else None
        self.rows = rows
        self._memory = memory
        if memory is not None:
            self._matches = torch.zeros(rows, 2, dtype=torch.int64)
            for index in self._operations.matching:
                self._program[index].matches = self._matches.data_ptr()
            self._put_automata(memory)
        widths = self._operations.widths
        self._buffers = [torch.zeros(rows, width) for width in widths]
        self._logits = self._buffers[self._operations.logits]
        self._tokens = (ctypes.c_int64 * rows)()
        self._addresses = native.addresses(self._buffers)
        self._strides = (ctypes.c_int64 * len(self._buffers))(*widths)
        library = native.kernels()
        assert library is not None
        assert library.operation_size() == ctypes.sizeof(Operation)
        self._step = library.decode_step
        self._arguments = (
            self._program,
            ctypes.c_int64(len(self._program)),
            self._tokens,
            self._addresses,
            self._strides,
            ctypes.c_int64(rows),
            ctypes.c_int64(max(1, min(torch.get_num_threads(), rows // ROWS_PER_THREAD))),
        )

    def _put_automata(self, memory: LiveMemory) -> None:
        remember = self._program[self._operations.matching[0]]
        remember.automata, remember.words = memory.automata.data_ptr(), memory.words


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
