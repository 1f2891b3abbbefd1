"""A prepared decoding step: the whole model in one compiled call, its state updated in place.

For float32 K-Stacks on a CPU whose base kernel streams and whose head is linear or gelu. `CausalLM` is
the definition; the prepared step agrees with it to rounding.
"""

from __future__ import annotations

import ctypes
from typing import TypeVar, cast

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
from kmixer.trail import check_lengths

# Threads cost more than they save below this many rows each.
ROWS_PER_THREAD = 16
# `advance` reads so many tokens at once, of all rows: more are hardly faster, and need the room.
TOKENS_AT_ONCE = 48
Read = TypeVar("Read")


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

    Weights are taken when it is made: it does not follow later training. Tokens that are read together cost about as
    much as one where the time is that of reading the weights; a long prompt is faster through the model.

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
        library = native.kernels()
        assert library is not None
        assert library.operation_size() == ctypes.sizeof(Operation)
        self._library = library
        self._state: list[K2State] = []
        self._memory: LiveMemory | None = None
        self._read: int | None = None  # tokens a row, since the sequences moved last
        self.restore(state)

    def step(self, tokens: Tensor) -> Tensor:
        """Logits (b, v) after one token a row (b,) int64, valid until the next call."""
        numbers = tokens.tolist() if tokens.dtype == torch.int64 and tokens.ndim == 1 else []
        if len(numbers) != self.rows:
            raise self._other_tokens(tokens)
        self._read = None
        if numbers and not 0 <= min(numbers) <= max(numbers) < self.vocabulary_size:
            check_tokens(tokens[:, None].cpu(), self.vocabulary_size)
        if self._memory is not None and self._memory.count_step():
            self._put_automata(self._memory)
        self._tokens[: self.rows] = numbers
        self._library.decode_step(*self._arguments)
        return self._logits

    def advance(self, tokens: Tensor) -> Tensor:
        """Logits (b, n, v) after each of the tokens (b, n) int64. Where it raises, the sequences stand as before."""
        check_tokens(tokens.cpu(), self.vocabulary_size)
        pieces = []
        for piece in tokens.split(max(1, TOKENS_AT_ONCE // max(1, self.rows)), dim=1):
            if piece.shape[1] == 1:
                pieces.append(self.step(piece[:, 0])[:, None].clone())
            else:
                pieces.append(self.read(piece))
                self.commit(torch.full((self.rows,), piece.shape[1]))
        return torch.cat(pieces, dim=1)

    def read(self, tokens: Tensor) -> Tensor:
        """Logits (b, n, v) after each of the tokens (b, n) int64, while the sequences stand where they stood."""
        if tokens.ndim != 2 or len(tokens) != self.rows or tokens.dtype != torch.int64:
            check_tokens(tokens.cpu(), self.vocabulary_size)
            raise self._other_tokens(tokens)
        n, numbers = tokens.shape[1], tokens.flatten().tolist()
        if numbers and not 0 <= min(numbers) <= max(numbers) < self.vocabulary_size:
            check_tokens(tokens.cpu(), self.vocabulary_size)
        self._read = None
        if n > self._width:
            self._allocate(n)
        if self._memory is not None and self._memory.make_room(n):
            self._put_automata(self._memory)
        self._tokens[: len(numbers)] = numbers
        logits = torch.empty(self.rows, n, self.vocabulary_size)
        program, count, given, addresses, strides, rows, _ = self._arguments
        index = self._operations.logits
        kept, addresses[index] = addresses[index], logits.data_ptr()
        threads = ctypes.c_int64(_threads(self.rows * n))
        self._library.decode_read(program, count, given, addresses, strides, rows, ctypes.c_int64(n), threads)
        addresses[index] = kept
        self._read = n
        return logits

    def commit(self, lengths: Tensor) -> None:
        """Stand after so many (b,) of the tokens that were read last."""
        n = check_read(self._read)
        check_lengths(lengths, self.rows, n)
        kept = (ctypes.c_int64 * self.rows)(*lengths.tolist())
        program, count, given, _, _, rows, threads = self._arguments
        self._library.decode_commit(program, count, given, kept, rows, ctypes.c_int64(n), threads)
        if self._memory is not None:
            self._memory.count_kept(lengths.cpu())
        self._read = None

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
        self._read = None
        if memory is not None:
            self._put_automata(memory)
        self._allocate(1)

    def _allocate(self, n: int) -> None:
        """Room for n tokens a row."""
        self._width, rows, program = n, self.rows * n, self._program
        widths = self._operations.widths
        self._buffers = [torch.zeros(rows, width) for width in widths]
        self._logits = self._buffers[self._operations.logits][: self.rows]
        self._logs = [
            tuple(torch.zeros(rows, width) for width in (program[index].rank, program[index].inputs))
            for index in self._operations.mixing
        ]
        for index, (keys, inputs) in zip(self._operations.mixing, self._logs, strict=True):
            program[index].keys, program[index].log = keys.data_ptr(), inputs.data_ptr()
        self._matches = torch.zeros(rows, 2, dtype=torch.int64)
        for index in self._operations.matching:
            program[index].matches = self._matches.data_ptr()
        self._tokens = (ctypes.c_int64 * rows)()
        self._addresses = native.addresses(self._buffers)
        self._strides = (ctypes.c_int64 * len(self._buffers))(*widths)
        self._arguments = (
            self._program,
            ctypes.c_int64(len(self._program)),
            self._tokens,
            self._addresses,
            self._strides,
            ctypes.c_int64(self.rows),
            ctypes.c_int64(_threads(self.rows)),
        )

    def _other_tokens(self, tokens: Tensor) -> InputError:
        return InputError(
            f"tokens: got {tuple(tokens.shape)} {tokens.dtype}; allowed: torch.int64, one or more for each of the "
            f"{self.rows} rows of this decoder's state"
        )

    def _put_automata(self, memory: LiveMemory) -> None:
        remember = self._program[self._operations.matching[0]]
        remember.automata, remember.words = memory.automata.data_ptr(), memory.words


def check_read(read: Read | None) -> Read:
    """What a decoder has read; raises InputError where nothing waits for a commit."""
    if read is None:
        raise InputError("commit: got nothing to keep; call read first, and commit once what it has read")
    return read


def _threads(rows: int) -> int:
    return max(1, min(torch.get_num_threads(), rows // ROWS_PER_THREAD))


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
