"""A prepared decoding step: the whole model in one compiled call, its state updated in place.

For float32 models on a CPU: K-Stacks whose base kernel streams, and transformers of softmax attention, Gaussian
attention and K2. `CausalLM` is the definition; the prepared step agrees with it to rounding.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from typing import TypeVar, cast

import torch
from torch import Tensor

from kmixer import native
from kmixer.errors import InputError
from kmixer.generation.live import ALL_ROWS, Live
from kmixer.generation.live_cache import Attending
from kmixer.generation.live_memory import LiveMemory
from kmixer.generation.live_weights import Adapting
from kmixer.generation.model_operations import model_program
from kmixer.generation.operations import Decoding, Operation
from kmixer.layers import BaseKernel, BlockState, FastWeights, K2Mixer
from kmixer.models.causal_lm import CausalLM, DecodedIn, RememberingState, check_tokens
from kmixer.models.heads import GeluHead, LinearHead, UntiedHead
from kmixer.models.known_parts import ADAPTING_K_STACK, TRANSFORMER, unknown_part
from kmixer.state import State, batch_of, check_state
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
    if part := unknown_part(model, (LinearHead, UntiedHead, GeluHead), ADAPTING_K_STACK, TRANSFORMER):
        return f"{part} is none of the parts it knows"
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
    """Whether a prepared decoder exists for this model on this machine.

    Raises InputError where it does not, and rounded matrices are asked for, which nothing else has.
    """
    problem = why_not_prepared(model)
    if problem and model.decoded_in != "float32":
        raise InputError(f"weights: got {model.decoded_in}; this model is decoded in float32 alone: {problem}")
    return problem is None


class PreparedDecoder:
    """A `Decoder` that makes a step in one compiled call; see `kmixer.generation.decoder`.

    Weights are taken when it is made: it does not follow later training. Tokens that are read together cost about as
    much as one where the time is that of reading the weights; a long prompt is faster through the model.

    Args:
        model: a model for which `can_prepare` holds.
        state: where the sequences stand, as the model returned it; copied.
        precision: of the matrices of linear maps, which are rounded; what is computed with them is float32. A step of
            one row takes the time that reading them does, and less of it in 16 or 8 bits, where keys and values of
            attention have 16 bits too. `model.decoded_in` when None.

    Raises InputError for another model, and for a state that is not of this one.
    """

    def __init__(self, model: CausalLM, state: State, *, precision: DecodedIn | None = None) -> None:
        if problem := why_not_prepared(model):
            raise InputError(f"a prepared decoder cannot take this model: {problem}; use EagerDecoder")
        self.vocabulary_size = model.vocabulary_size
        self._initial = model.initial_state(0)
        self._copy_memory = None if model.copy_memory is None else model.copy_memory.memory
        program = model_program(model, precision or model.decoded_in)
        self._live, self._matching, self._strides = program.live, program.matching, program.strides()
        self._program = program.finish()
        self._weights = program  # which keeps them in memory
        self._library = _declared()
        self._decoding = Decoding(
            operations=self._program,
            count=len(self._program),
            logits=program.logits,
            vocabulary=self.vocabulary_size,
        )
        self._where = ctypes.addressof(self._decoding)
        self._memory: LiveMemory | None = None
        self._read: int | None = None  # tokens per row, since the sequences moved last
        self.rows = self._width = -1  # no room yet
        self._room: float = 0  # positions
        self._left: float = 0  # tokens until it is full
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
        if self._left < 1:
            check_tokens(given[:, None], self.vocabulary_size)
            self._make_room(self._width)
        if not self._library.decode_step(self._where, given.data_ptr(), *self._threads):
            check_tokens(given[:, None], self.vocabulary_size)
        self._left -= 1
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
        if n > self._width or n > self._left:
            check_tokens(given, self.vocabulary_size)  # before what was read is lost
            self._make_room(max(n, self._width))
        if self._memory is not None and self._memory.make_room(n):
            self._put_automata(self._memory)
        logits = torch.empty(self.rows, n, self.vocabulary_size, dtype=torch.float32)
        threads = self._threads if self.rows == 1 else _threads(self.rows * n)
        if not self._library.decode_read(self._where, given.data_ptr(), n, logits.data_ptr(), *threads):
            check_tokens(given, self.vocabulary_size)
        self._read = n
        return logits

    def commit(self, lengths: Tensor) -> None:
        """Stand after so many (b,) of the tokens that were read last."""
        n = check_read(self._read)
        check_lengths(lengths, self.rows, n)
        kept = _plain(lengths)
        self._library.decode_commit(self._where, n, kept.data_ptr(), self._threads[0])
        if self._memory is not None:
            self._memory.count_kept(kept)
        self._left -= max(lengths.tolist(), default=0)
        self._read = None

    def state(self) -> State:
        """Where the sequences stand; a snapshot, as the model takes it."""
        stack = self._stack_state()
        return stack if self._memory is None else RememberingState(stack, self._memory.state())

    def restore(self, state: State) -> None:
        """Stand where the state says, of any number of rows; it is copied. Raises InputError for another model's."""
        rows = batch_of(state)
        check_state(state, self._initial, rows)
        memory = None
        if isinstance(state, RememberingState):
            state, remembered = state
            check_tokens(remembered.tokens[..., 0], self.vocabulary_size)  # they choose rows of a table
            memory = LiveMemory(remembered, self._copy_memory)
        parts = list(parts_of(state))
        for live, part in zip(self._live, parts, strict=True):
            live.check(part)
        self._stand_at(parts, rows, max(1, self._width) if rows == self.rows else 1)
        self._memory = memory
        self._read = None
        if memory is not None:
            self._put_automata(memory)

    def _stack_state(self, chosen: slice = ALL_ROWS) -> State:
        """Where the chosen rows stand, without a copy memory."""
        initial = self._initial.stack if isinstance(self._initial, RememberingState) else self._initial
        return _filled(initial, iter(self._live), chosen)

    @torch.inference_mode(False)  # what is made inside cannot be written to outside
    @torch.no_grad()
    def _stand_at(self, parts: list[State], rows: int, n: int) -> None:
        """Let so many rows stand where the states of the layers say, with room for n tokens at once."""
        seen = max((live.seen(part) for live, part in zip(self._live, parts, strict=True)), default=0)
        if (rows, n) != (self.rows, self._width) or seen + n > self._room:
            self._allocate(rows, n, seen)
        for live, part in zip(self._live, parts, strict=True):
            live.stand_at(part)
        self._left = self._room - seen

    def _allocate(self, rows: int, n: int, seen: int) -> None:
        """Room for so many rows that have seen so much and read n tokens at once; where they stand is not set."""
        self.rows, self._width, self._shape = rows, n, torch.Size([rows])
        self._threads = _threads(rows)
        decoding = self._decoding
        self._buffers = [torch.zeros(rows * n, stride, dtype=torch.float32) for stride in self._strides]
        self._logits = self._buffers[decoding.logits][:rows]
        for live in self._live:
            live.allocate(rows, n, seen)
        self._room = min((live.room for live in self._live), default=math.inf)
        self._matches = torch.zeros(rows * n, 2, dtype=torch.int64)
        for index in self._matching:
            self._program[index].matches = self._matches.data_ptr()
        decoding.buffers = native.addresses(self._buffers)
        decoding.strides = (ctypes.c_int64 * len(self._strides))(*self._strides)
        decoding.tokens = (ctypes.c_int64 * (rows * n))()
        decoding.rows = rows

    def _make_room(self, n: int) -> None:
        """Room for n tokens per row, which stand where they stood."""
        self._stand_at([live.state() for live in self._live], self.rows, n)

    def _other_tokens(self, tokens: Tensor) -> InputError:
        return InputError(
            f"tokens: got {tuple(tokens.shape)} {tokens.dtype}; allowed: torch.int64, one or more for each of the "
            f"{self.rows} rows of this decoder's state"
        )

    def _put_automata(self, memory: LiveMemory) -> None:
        remember = self._program[self._matching[0]]
        remember.automata, remember.words = memory.automata.data_ptr(), memory.words


def check_read(read: Read | None) -> Read:
    """What a decoder has read; raises InputError where nothing waits for a commit."""
    if read is None:
        raise InputError("commit: got nothing to keep; call read first, and commit once what it has read")
    return read


def _threads(rows: int) -> tuple[int, int]:
    """Threads that share rows, and threads that share the outputs of large matrices: one of these is 1."""
    all_of_them = torch.get_num_threads()
    sharing_rows = max(1, min(all_of_them, rows // ROWS_PER_THREAD))
    return sharing_rows, all_of_them if sharing_rows == 1 else 1


def _plain(numbers: Tensor) -> Tensor:
    """As the library reads them."""
    return numbers if numbers.is_cpu and numbers.is_contiguous() else numbers.cpu().contiguous()


def parts_of(state: State) -> Iterator[State]:
    """What the layers of a stack carry, in their order."""
    if isinstance(state, BlockState):
        yield from (part for part in state if part is not None)
    elif isinstance(state, tuple):
        for part in state:
            yield from parts_of(part)


def _filled(like: State, live: Iterator[Live], chosen: slice) -> State:
    """The state of a stack, of what its layers carry: a tree like another."""
    if isinstance(like, BlockState):
        return BlockState(*(None if part is None else next(live).state(chosen) for part in like))
    return tuple(_filled(part, live, chosen) for part in cast("tuple[State, ...]", like))


def _declared() -> ctypes.CDLL:
    """The library, with the types of what decoding takes."""
    library = native.kernels()
    assert library is not None
    assert library.operation_size() == ctypes.sizeof(Operation)
    assert library.decoding_size() == ctypes.sizeof(Decoding)
    assert library.fast_weights_size() == ctypes.sizeof(Adapting)
    assert library.decoding_attention_size() == ctypes.sizeof(Attending)
    number, address = ctypes.c_int64, ctypes.c_void_p
    library.decode_step.argtypes = [address, address, number, number]
    library.decode_read.argtypes = [address, address, number, address, number, number]
    library.decode_commit.argtypes = [address, number, address, number]
    library.decode_step.restype = library.decode_read.restype = number
    return library


def _biased(layer: torch.nn.Linear | None) -> bool:
    return layer is not None and layer.bias is not None
