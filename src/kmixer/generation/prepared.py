"""A prepared decoding step: the whole model in one compiled call, its state updated in place.

For float32 K-Stacks on a CPU whose base kernel streams and whose head is linear or gelu. `CausalLM` is
the definition; the prepared step agrees with it to rounding.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import TypeVar, cast

import torch
from torch import Tensor

from kmixer import native
from kmixer.errors import InputError
from kmixer.generation.live_memory import LiveMemory
from kmixer.generation.live_weights import Adapting
from kmixer.generation.operations import WHOLE, Decoding, Operation, Operations
from kmixer.generation.panels import whole
from kmixer.layers import BaseKernel, BlockState, FastWeights, K2Mixer, K2State
from kmixer.layers.fast_weights import FastState
from kmixer.models.causal_lm import CausalLM, RememberingState, check_tokens
from kmixer.models.heads import GeluHead, LinearHead
from kmixer.models.k_stack import KStack, KStackState
from kmixer.models.known_parts import ADAPTING_K_STACK, unknown_part
from kmixer.state import State, batch_of, check_state, map_tensors, tensors
from kmixer.trail import check_lengths

# Threads cost more than they save below this many rows each.
ROWS_PER_THREAD = 16
# `advance` reads so many tokens at once, of all rows: more are hardly faster, and need the room.
TOKENS_AT_ONCE = 48
Read = TypeVar("Read")


def why_not_prepared(model: CausalLM) -> str | None:
    """What a prepared decoder cannot do of this model on this machine; None where it can do all."""
    if problem := why_no_operations(model):
        return problem
    if not native.usable(*model.parameters()):
        return "the compiled kernels were not built"
    return None


def why_no_operations(model: CausalLM) -> str | None:
    """What the list of operations of a step cannot say of this model; None where it can say all.

    An allow-list: every part is exactly of a type whose operations are known, and the rest of what it computes is too.
    """
    stack, head = model.stack, model.head
    if part := unknown_part(model, (LinearHead, GeluHead), ADAPTING_K_STACK):
        return f"{part} is none of the parts it knows"
    assert isinstance(stack, KStack)
    if isinstance(head, LinearHead) and head.soft_cap is not None:
        return "head has a soft cap"
    for name, kernel in model.named_modules():
        if isinstance(kernel, BaseKernel) and kernel.kind not in ("toeplitz", "conv"):
            return f"{name} is a {kernel.kind} base kernel, which ends"
    if any(isinstance(mixer, K2Mixer) and _biased(mixer.output_gate) for mixer in model.modules()):
        return "an output gate has a bias"
    for name, fast in model.named_modules():
        if isinstance(fast, FastWeights) and (fast.chunk == 1 or not fast.adapts):
            return f"{name} {'is switched off' if not fast.adapts else 'has chunks of one token'}"
    if model.training:
        return "the model is in training mode"
    if any(parameter.dtype != torch.float32 or not parameter.is_cpu for parameter in model.parameters()):
        return "its weights are not float32 on a CPU"
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
        blocks = [model.stack.first, *model.stack.blocks, model.stack.last]
        # Of every block, whether its mixer and its feed-forward layer have a state.
        self._blocks = [(isinstance(block.mixer, K2Mixer), block.fast_weights is not None) for block in blocks]
        self._passes = model.stack.passes
        self._operations = Operations(model)
        self._program = (Operation * len(self._operations.list))(*self._operations.list)
        self._library = _declared()
        self._decoding = Decoding(
            operations=self._program,
            count=len(self._program),
            logits=self._operations.logits,
            vocabulary=self.vocabulary_size,
        )
        self._where = ctypes.addressof(self._decoding)
        self._memory: LiveMemory | None = None
        self._read: int | None = None  # tokens a row, since the sequences moved last
        self.rows = self._width = -1  # no room yet
        self.restore(state)

    def step(self, tokens: Tensor) -> Tensor:
        """Logits (b, v) after one token a row (b,) int64, valid until the next call."""
        if tokens.dtype != torch.int64 or tokens.shape != self._shape:
            raise self._other_tokens(tokens)
        given = _plain(tokens)
        if self._memory is not None:
            check_tokens(given[:, None], self.vocabulary_size)  # before they are counted
            if self._memory.count_step():
                self._put_automata(self._memory)
        if not self._library.decode_step(self._where, given.data_ptr(), self._threads):
            check_tokens(given[:, None], self.vocabulary_size)
        self._read = None
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
        shape, n = tokens.shape, tokens.shape[-1] if tokens.ndim else 0
        if len(shape) != 2 or shape[0] != self.rows or tokens.dtype != torch.int64:
            check_tokens(tokens.cpu(), self.vocabulary_size)
            raise self._other_tokens(tokens)
        given = _plain(tokens)
        if n > self._width:
            check_tokens(given, self.vocabulary_size)  # before what was read is lost
            self._make_room(n)
        if self._memory is not None and self._memory.make_room(n):
            self._put_automata(self._memory)
        logits = torch.empty(self.rows, n, self.vocabulary_size, dtype=torch.float32)
        threads = self._threads if self.rows == 1 else _threads(self.rows * n)
        if not self._library.decode_read(self._where, given.data_ptr(), n, logits.data_ptr(), threads):
            check_tokens(given, self.vocabulary_size)
        self._read = n
        return logits

    def commit(self, lengths: Tensor) -> None:
        """Stand after so many (b,) of the tokens that were read last."""
        n = check_read(self._read)
        check_lengths(lengths, self.rows, n)
        kept = _plain(lengths)
        self._library.decode_commit(self._where, n, kept.data_ptr(), self._threads)
        if self._memory is not None:
            self._memory.count_kept(kept)
        self._read = None

    def state(self) -> State:
        """Where the sequences stand; a snapshot, as the model takes it."""
        mixed = iter(map_tensors(_copy, part) for part in self._parts)
        learned = iter(self._operations.adapting)
        stack = tuple(
            tuple(
                BlockState(next(mixed) if mixes else None, next(learned).state() if adapts else None)
                for mixes, adapts in self._blocks
            )
            for _ in range(self._passes)
        )
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
        blocks = [block for of_pass in cast("KStackState", state) for block in of_pass]
        learned = [block.feed_forward for block in blocks if isinstance(block.feed_forward, FastState)]
        for live, other in zip(self._operations.adapting, learned, strict=True):
            live.check(other)
        if rows != self.rows:
            self._allocate(rows, 1)
        self._stand_at([block.mixer for block in blocks], learned)
        self._memory = memory
        self._read = None
        if memory is not None:
            self._put_automata(memory)

    @torch.inference_mode(False)  # what is made inside cannot be written to outside
    def _allocate(self, rows: int, n: int) -> None:
        """Room for so many rows of n tokens; where the sequences stand is not set."""
        zeros = functools.partial(torch.zeros, dtype=torch.float32)
        self.rows, self._width, self._shape = rows, n, torch.Size([rows])
        self._threads = _threads(rows)
        operations, program, decoding = self._operations, self._program, self._decoding
        strides = operations.strides()
        self._buffers = [zeros(rows * n, stride) for stride in strides]
        self._logits = self._buffers[operations.logits][:rows]
        self._parts: list[K2State] = []  # views of what the layers mix from, see `Operation` in native/decode_state.h
        self._keys: list[Tensor] = []
        for index in operations.mixing:
            mix = program[index]
            mixed = zeros(rows, mix.rank + max(0, mix.lags - 1) + n, whole(mix.inputs))
            keys = zeros(rows * n, whole(mix.rank, WHOLE))
            mix.state, mix.span, mix.keys = mixed.data_ptr(), mixed.stride(0), keys.data_ptr()
            decay, base = mixed[..., : mix.inputs].split([mix.rank, mixed.shape[1] - mix.rank], dim=1)
            self._parts.append(K2State(decay, base[:, : mix.lags - 1] if mix.lags else None))
            self._keys.append(keys)
        for live in operations.adapting:
            live.allocate(rows, n)
        self._matches = torch.zeros(rows * n, 2, dtype=torch.int64)
        for index in operations.matching:
            program[index].matches = self._matches.data_ptr()
        decoding.buffers = native.addresses(self._buffers)
        decoding.strides = (ctypes.c_int64 * len(strides))(*strides)
        decoding.tokens = (ctypes.c_int64 * (rows * n))()
        decoding.rows = rows

    def _make_room(self, n: int) -> None:
        """Room for n tokens a row, which stand where they stood."""
        before, learned = self._parts, [live.state() for live in self._operations.adapting]
        self._allocate(self.rows, n)
        self._stand_at(before, learned)

    @torch.no_grad()
    def _stand_at(self, states: Sequence[State], learned: Sequence[FastState]) -> None:
        """Copy the states of the layers, and of those with fast weights."""
        for mine, other in zip(tensors(tuple(self._parts)), tensors(tuple(states)), strict=True):
            mine.copy_(other)
        for live, state in zip(self._operations.adapting, learned, strict=True):
            live.stand_at(state)

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


def _plain(numbers: Tensor) -> Tensor:
    """As the library reads them."""
    return numbers if numbers.is_cpu and numbers.is_contiguous() else numbers.cpu().contiguous()


def _copy(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def _declared() -> ctypes.CDLL:
    """The library, with the types of what decoding takes."""
    library = native.kernels()
    assert library is not None
    assert library.operation_size() == ctypes.sizeof(Operation)
    assert library.decoding_size() == ctypes.sizeof(Decoding)
    assert library.fast_weights_size() == ctypes.sizeof(Adapting)
    number, address = ctypes.c_int64, ctypes.c_void_p
    library.decode_step.argtypes = [address, address, number]
    library.decode_read.argtypes = [address, address, number, address, number]
    library.decode_commit.argtypes = [address, number, address, number]
    library.decode_step.restype = library.decode_read.restype = number
    return library


def _biased(layer: torch.nn.Linear | None) -> bool:
    return layer is not None and layer.bias is not None
