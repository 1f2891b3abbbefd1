"""What followed the last time the latest tokens were seen: the longest repeated suffix, and the token after it.

    l_t = the largest l >= 1 such that x[t-l+1 .. t] also ends at some j < t (both may overlap); 0 where there is none
    j_t = the most recent such j
    copied_t = x[j_t + 1], or -1 where l_t = 0

With a memory of M tokens, x begins at s(t) = max(0, (floor(t / (M/2)) - 1) M/2): from M/2 to M tokens before the
newest one are seen, moved in halves. s is a function of t alone, so any split of a sequence gives the whole.

* `definition` compares every j, as it stands above. Quadratic in the tokens that are seen.
* `python` is an online suffix automaton in Python: microseconds per token, for machines without a compiler.
* `native` is the same compiled, in O(log n) per token whatever the text (native/suffix_automaton.h).

Source: Blumer et al. 1985 (suffix automaton); RWKV-8's ROSA, as Koneko's later code has it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Int
from torch import Tensor

from kmixer import native
from kmixer.errors import InputError, check_choice
from kmixer.ops.python_automaton import PythonAutomaton
from kmixer.state import check_state
from kmixer.trail import counted, ends

Backend = Literal["auto", "definition", "python", "native"]
BACKENDS: tuple[str, ...] = get_args(Backend)

# Up to this many new tokens are looked up in the remembered text as it lies there; for more, an automaton of it is
# made first. Compiled, a look-up takes 1 to 2 ns per remembered token, and an automaton of 2,048 to 65,536 characters
# 20 to 120 ns. In Python 0.1 us and 3 us; there the look-up is the definition, slow where tokens repeat.
FEW_NATIVE = 16
FEW_PYTHON = 8
# The kernel counts tokens, two states each, in int32.
LARGEST_TOKEN = 2**31 - 1
LONGEST_TEXT = 2**29

Matches = list[tuple[int, int]]  # of one row, by token: what it copies, the length of the match


class SuffixState(NamedTuple):
    """What is remembered: the last tokens, with zeros before them in rows that remember fewer; how many were seen."""

    tokens: Int[Tensor, "b n 1"]
    position: Int[Tensor, " b"]


def initial_state(batch_size: int, device: torch.device | str | None = None) -> SuffixState:
    """The state before the first token."""
    tokens = torch.zeros(batch_size, 0, 1, dtype=torch.int64, device=device)
    return SuffixState(tokens, torch.zeros(batch_size, dtype=torch.int64, device=device))


def suffix_matches(
    tokens: Int[Tensor, "b t"],
    state: SuffixState | None = None,
    memory: int | None = None,
    *,
    longest: int | None = None,
    backend: Backend = "auto",
) -> tuple[Int[Tensor, "b t"], Int[Tensor, "b t"], SuffixState]:
    """The token that followed the last time the longest repeated suffix was seen, and that suffix's length.

    "abcabd" copies - - - b c - with lengths 0 0 0 1 2 0. Of x_0 .. x_t alone: strictly causal. Any split of a sequence
    gives the result of the whole: pass the returned state on.

    Args:
        tokens: (b, t) int64 or int32, from 0 to 2^31 - 1, on any device; the computation is on the CPU.
        state: what was remembered before; of None, nothing. Rows may stand at different positions.
        memory: M, even: how many tokens are remembered at most; None: all. The same at every call with a state.
        longest: of a longer suffix its last so many tokens count: where they last occurred, what followed them.
        backend: "auto" takes `native` where the kernels were built, and `python` elsewhere, with a warning.

    Returns:
        copied (b, t), -1 where there is no match; lengths (b, t), 0 there; both int64. The state after the last
        token: of every row the p - s(p) tokens that are seen before the token at p, its position.

    Raises:
        InputError: tokens of another shape, dtype or range; a memory that is odd or below 2; a longest match below 1; a
            state of another batch, or that remembers too little; a backend that does not exist or cannot run here.
    """
    _check(tokens, memory, longest, backend)
    b, t = tokens.shape
    initial = initial_state(b, tokens.device)
    if state is None:
        state = initial
    check_state(state, initial, b)
    positions: list[int] = state.position.tolist()
    before = _remembered(state, positions, memory)
    text = torch.cat([state.tokens[:, state.tokens.shape[1] - max(before, default=0) :, 0], tokens.long()], dim=1)
    _check_length(text, memory)
    if backend == "auto":
        backend = _automatic_backend()
    copied, lengths = _BACKENDS[backend](text.cpu().contiguous(), positions, t, memory, longest or LARGEST_TOKEN)
    after = SuffixState(_kept(text, [p + t for p in positions], memory), state.position + t)
    return copied.to(tokens.device), lengths.to(tokens.device), after


def trail_of(tokens: Int[Tensor, "b t"], state: SuffixState | None, memory: int | None) -> SuffixState:
    """The trail (`kmixer.trail`) of a call of `suffix_matches` with these arguments."""
    b, t = tokens.shape
    before, position = initial_state(b, tokens.device) if state is None else state
    text = torch.cat([before, tokens.long()[..., None]], dim=1)
    counts = [[at - remembers_from(at, memory) for at in range(p, p + t + 1)] for p in position.tolist()]
    kept = torch.tensor(counts, dtype=torch.int64, device=tokens.device).view(b, t + 1)
    return SuffixState(ends(text, range(t, -1, -1), kept), counted(position, t))


def remembers_from(position: int, memory: int | None) -> int:
    """s(t): the first position that is remembered at position t."""
    half = 0 if memory is None else memory // 2
    return max(0, (position // half - 1) * half) if half else 0


def _check(tokens: Tensor, memory: int | None, longest: int | None, backend: str) -> None:
    check_choice("backend", backend, BACKENDS)
    if backend == "native" and native.kernels() is None:
        raise InputError(
            "backend 'native' needs the compiled kernels, which are built at installation where there is a C++ "
            "compiler; backend 'python' runs everywhere"
        )
    if memory is not None and (not isinstance(memory, int) or memory < 2 or memory % 2):
        raise InputError(f"memory: got {memory!r}; allowed: an even number from 2 on, or None to remember everything")
    if longest is not None and longest < 1:
        raise InputError(f"longest: got {longest}; allowed: 1 token or more, or None for matches of any length")
    if tokens.ndim != 2 or tokens.dtype not in (torch.int64, torch.int32):
        given = f"{tuple(tokens.shape)} in {str(tokens.dtype).removeprefix('torch.')}"
        raise InputError(f"suffix_matches: got tokens {given}; allowed: (b, t) in int64 or int32")
    if tokens.numel():
        lowest, highest = (int(x) for x in torch.aminmax(tokens))
        if lowest < 0 or highest > LARGEST_TOKEN:
            raise InputError(f"suffix_matches: got tokens {lowest}..{highest}; allowed: 0..{LARGEST_TOKEN}")


def _check_length(text: Tensor, memory: int | None) -> None:
    if (longest := text.shape[1] if memory is None else memory) > LONGEST_TEXT:
        raise InputError(
            f"suffix_matches: got {longest:,} tokens to remember; allowed: {LONGEST_TEXT:,}; give a smaller memory"
        )


def _remembered(state: SuffixState, positions: list[int], memory: int | None) -> list[int]:
    """How many tokens every row remembers before its next one."""
    if min(positions, default=0) < 0:
        raise InputError(f"state: got positions {positions}; allowed: 0 or more")
    before = [p - remembers_from(p, memory) for p in positions]
    kept = state.tokens.shape[1]
    if max(before, default=0) > kept:
        raise InputError(
            f"state: got {kept} remembered tokens; {max(before)} are needed at positions {positions} with memory "
            f"{memory}; give the memory that the state was made with"
        )
    return before


def _kept(text: Tensor, positions: list[int], memory: int | None) -> Int[Tensor, "b n 1"]:
    """Of the text, what rows at these positions remember: in memory of its own, zeros before it."""
    counts = [p - remembers_from(p, memory) for p in positions]
    width = max(counts, default=0)
    last = text[:, text.shape[1] - width :]
    padded = torch.tensor([width - count for count in counts], dtype=torch.int64, device=text.device)
    padding = torch.arange(width, device=text.device) < padded[:, None]
    return last.masked_fill(padding, 0)[..., None]


def _automatic_backend() -> Backend:
    if native.kernels() is not None:
        return "native"
    _warn_slow()
    return "python"


@cache
def _warn_slow() -> None:
    """Says once in a process what a machine without compiled kernels costs."""
    warnings.warn(
        "suffix_matches runs in Python, at microseconds per token, as the compiled kernels were not built: install "
        "kmixer again (pip install -e .) where there is a C++ compiler",
        stacklevel=4,
    )


def _native(text: Tensor, positions: list[int], t: int, memory: int | None, longest: int) -> tuple[Tensor, Tensor]:
    before = torch.tensor([p - remembers_from(p, memory) for p in positions], dtype=torch.int64)
    copied, lengths = (torch.empty(len(text), t, dtype=torch.int64) for _ in range(2))
    sizes = (*text.shape, t, -1 if memory is None else memory)
    native.call("suffix_matches", text, before, copied, lengths, *sizes, longest, int(t <= FEW_NATIVE))
    return copied, lengths


def longest_match(x: Sequence[int], longest: int = LARGEST_TOKEN) -> tuple[int, int]:
    """The definition for the last token of x: what it copies, and the length of the match."""
    t, copied, length = len(x) - 1, -1, 0
    for j in range(t - 1, -1, -1):
        same = 0
        while same <= min(j, longest - 1) and x[j - same] == x[t - same]:
            same += 1
        if same > length:
            copied, length = x[j + 1], same
    return copied, length


def _defined(row: list[int], position: int, t: int, memory: int | None, longest: int) -> Matches:
    origin = len(row) - t - position  # where position 0 stands, or would if it were remembered
    return [
        longest_match(row[origin + remembers_from(at, memory) : origin + at + 1], longest)
        for at in range(position, position + t)
    ]


def _stepped(row: list[int], position: int, t: int, memory: int | None, longest: int) -> Matches:
    if t <= FEW_PYTHON:
        return _defined(row, position, t, memory, longest)
    origin = len(row) - t - position
    begin = remembers_from(position, memory)
    automaton = PythonAutomaton(row[origin + begin : origin + position], longest)
    matches = []
    for at in range(position, position + t):
        if begin != remembers_from(at, memory):
            begin = remembers_from(at, memory)
            automaton = PythonAutomaton(row[origin + begin : origin + at], longest)
        matches.append(automaton.push(row[origin + at]))
    return matches


def _by_row(
    matches: Callable[[list[int], int, int, int | None, int], Matches],
) -> Callable[..., tuple[Tensor, Tensor]]:
    def run(text: Tensor, positions: list[int], t: int, memory: int | None, longest: int) -> tuple[Tensor, Tensor]:
        rows = [matches(row, p, t, memory, longest) for row, p in zip(text.tolist(), positions, strict=True)]
        both = torch.tensor(rows, dtype=torch.int64).view(len(text), t, 2)
        return both[..., 0].contiguous(), both[..., 1].contiguous()

    return run


_BACKENDS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "definition": _by_row(_defined),
    "python": _by_row(_stepped),
    "native": _native,
}
