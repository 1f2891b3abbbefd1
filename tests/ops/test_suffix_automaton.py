"""The longest repeated suffix and what followed it: every fast way is the definition, number for number."""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kmixer import native
from kmixer.errors import InputError
from kmixer.ops import suffix_automaton
from kmixer.ops.suffix_automaton import Backend, SuffixState, initial_state, remembers_from, suffix_matches
from kmixer.state import join, nbytes, rows, tensors
from tests.conftest import threads_of_torch

BUILT = native.kernels() is not None
needs_kernels = pytest.mark.skipif(not BUILT, reason="the compiled kernels were not built")
FAST: tuple[Backend, ...] = ("native", "python") if BUILT else ("python",)

texts = st.integers(1, 6).flatmap(lambda v: st.lists(st.integers(0, v - 1), min_size=1, max_size=120))
memories = st.one_of(st.none(), st.integers(1, 20).map(lambda half: 2 * half))


def fibonacci(n: int) -> list[int]:
    """abaababa...: as many repeats as a text can have."""
    word, before = [0, 1], [0]
    while len(word) < n:
        word, before = word + before, word
    return word[:n]


def de_bruijn(order: int) -> list[int]:
    """Over two tokens, all words of a length, one after the other and none twice."""
    word: list[int] = []

    def extend(prefix: list[int], period: int) -> None:
        if len(prefix) > order:
            word.extend(prefix[1 : period + 1] if order % period == 0 else [])
            return
        for token in range(prefix[-period], 2):
            extend([*prefix, token], period if token == prefix[-period] else len(prefix))

    extend([0], 1)
    return word


def growing_runs(n: int) -> list[int]:
    """ab aab aaab ..."""
    return [token for run in range(1, n) for token in [0] * run + [1]][:n]


ADVERSARIAL = {
    "one token": [0] * 300,
    "two in turn": [0, 1] * 150,
    "Fibonacci": fibonacci(300),
    "de Bruijn": de_bruijn(8),
    "growing runs": growing_runs(300),
    "a run, then another token, many times": ([0] * 29 + [1]) * 10,
    "a text repeated": [ord(c) for c in "to be, or not to be: that is the question "] * 8,
}


def same(first: tuple[Tensor, Tensor, SuffixState], second: tuple[Tensor, Tensor, SuffixState]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(tensors(first), tensors(second), strict=True))


def split(
    tokens: Tensor,
    sizes: list[int],
    memory: int | None,
    backend: Backend,
    state: SuffixState | None = None,
    longest: int | None = None,
) -> tuple[Tensor, Tensor, SuffixState]:
    """In parts of these sizes, over and over, with the state handed on."""
    copied, lengths, begin = [], [], 0
    while begin < tokens.shape[1]:
        end = begin + sizes[len(copied) % len(sizes)]
        c, n, state = suffix_matches(tokens[:, begin:end], state, memory, longest=longest, backend=backend)
        copied.append(c)
        lengths.append(n)
        begin = end
    assert state is not None
    return torch.cat(copied, 1), torch.cat(lengths, 1), state


@pytest.mark.parametrize("backend", ["definition", *FAST])
def test_worked_examples(backend: Backend) -> None:
    for text, copied, lengths in (("abcabd", "---bc-", "000120"), ("aaaa", "-aaa", "0123"), ("", "", "")):
        tokens = torch.tensor([[ord(c) for c in text]], dtype=torch.int64)
        expected = [-1 if c == "-" else ord(c) for c in copied]
        matches = suffix_matches(tokens, backend=backend)
        assert [x[0].tolist() for x in matches[:2]] == [expected, [int(n) for n in lengths]]


@pytest.mark.parametrize("backend", FAST)
@settings(max_examples=150)
@given(texts, memories, st.none() | st.integers(1, 6))
def test_fast_ways_are_the_definition(
    backend: Backend, text: list[int], memory: int | None, longest: int | None
) -> None:
    tokens = torch.tensor([text])
    exact = suffix_matches(tokens, memory=memory, longest=longest, backend="definition")
    assert same(suffix_matches(tokens, memory=memory, longest=longest, backend=backend), exact)
    assert same(split(tokens, [1], memory, backend, longest=longest), exact)


@needs_kernels
@settings(max_examples=100)
@given(texts, st.integers(0, 120), memories.map(lambda memory: memory and 100 + memory), st.none() | st.integers(1, 6))
def test_after_a_run_that_is_too_long_to_walk_over(
    text: list[int], run: int, memory: int | None, longest: int | None
) -> None:
    """The compiled automaton goes on with paths: at any token after it made them, and back without when it forgets."""
    tokens = torch.tensor([[0] * run + text + [1] * run + text[::-1]])
    exact = suffix_matches(tokens, memory=memory, longest=longest, backend="python")
    assert same(suffix_matches(tokens, memory=memory, longest=longest, backend="native"), exact)
    assert same(split(tokens, [90, 7, 30], memory, "native", longest=longest), exact)


@given(texts, st.integers(1, 6))
def test_bounded_matches_are_the_last_tokens_of_the_longest(text: list[int], longest: int) -> None:
    tokens = torch.tensor([text])
    copied, lengths, _ = suffix_matches(tokens, longest=longest)
    unbounded, whole, _ = suffix_matches(tokens)
    assert torch.equal(lengths, whole.clamp(max=longest))
    short = whole <= longest
    assert torch.equal(copied[short], unbounded[short])
    for t in (~short[0]).nonzero().flatten().tolist():
        ends = [j for j in range(longest - 1, t) if text[j - longest + 1 : j + 1] == text[t - longest + 1 : t + 1]]
        assert copied[0, t] == text[max(ends) + 1]


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("name", ADVERSARIAL)
@pytest.mark.parametrize(("memory", "longest"), [(None, None), (64, None), (None, 3)])
def test_texts_that_are_hard(name: str, memory: int | None, longest: int | None, backend: Backend) -> None:
    tokens = torch.tensor([ADVERSARIAL[name]])
    exact = suffix_matches(tokens, memory=memory, longest=longest, backend="definition")
    assert same(suffix_matches(tokens, memory=memory, longest=longest, backend=backend), exact)
    assert same(split(tokens, [5], memory, backend, longest=longest), exact)


@needs_kernels
@pytest.mark.parametrize("size", [2, 300, 50_000])
def test_long_texts_and_large_vocabularies(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    random = torch.randint(size, (2, 4000), generator=generator) + (2**31 - size)
    tokens = torch.cat([random, random[:, 1000:3000]], dim=1)
    assert same(suffix_matches(tokens, backend="native"), suffix_matches(tokens, backend="python"))


@pytest.mark.parametrize("backend", FAST)
@given(texts, memories, st.lists(st.integers(0, 40), min_size=1, max_size=4).filter(any))
def test_any_split_is_the_whole(backend: Backend, text: list[int], memory: int | None, sizes: list[int]) -> None:
    tokens = torch.tensor([text])
    whole = suffix_matches(tokens, memory=memory, backend=backend)
    for parts in (sizes, [1]):
        assert same(split(tokens, parts, memory, backend), whole)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("memory", [2, 6, 48])
def test_around_every_half(memory: int, backend: Backend) -> None:
    """A split at, just before and just after each boundary; the state is what may be seen there, and no more."""
    half, tokens = memory // 2, torch.tensor([ADVERSARIAL["Fibonacci"]])[:, : 4 * memory]
    whole = suffix_matches(tokens, memory=memory, backend="definition")
    for at in range(half - 1, tokens.shape[1]):
        if at % half not in (0, 1, half - 1):
            continue
        first, _, state = suffix_matches(tokens[:, :at], memory=memory, backend=backend)
        begin = max(0, (at // half - 1) * half)
        assert remembers_from(at, memory) == begin
        assert torch.equal(state.tokens[0, :, 0], tokens[0, begin:at])
        copied, lengths, last = suffix_matches(tokens[:, at:], state, memory, backend=backend)
        assert same((torch.cat([first, copied], 1), lengths, last), (whole[0], whole[1][:, at:], whole[2]))


@pytest.mark.parametrize("backend", FAST)
def test_what_is_seen_ends_at_the_memory(backend: Backend) -> None:
    """Another beginning, before what is remembered, changes nothing."""
    memory = 16
    tokens = torch.tensor([ADVERSARIAL["growing runs"], ADVERSARIAL["growing runs"]])[:, :100]
    tokens[1, :40] = 5
    copied, lengths, state = suffix_matches(tokens, memory=memory, backend=backend)
    at = next(t for t in range(100) if remembers_from(t, memory) >= 40)
    assert torch.equal(copied[0, at:], copied[1, at:]) and torch.equal(lengths[0, at:], lengths[1, at:])
    assert torch.equal(*state.tokens)
    assert lengths.max() < memory


@pytest.mark.parametrize("backend", FAST)
@given(st.lists(texts, min_size=2, max_size=4), memories, st.integers(0, 30))
def test_rows_at_different_positions(backend: Backend, prompts: list[list[int]], memory: int | None, t: int) -> None:
    """Joined, reordered or alone, a row goes on as it would have; a row is not touched by those beside it."""
    states = [suffix_matches(torch.tensor([prompt]), memory=memory, backend=backend)[2] for prompt in prompts]
    tokens = torch.arange(t * len(prompts)).view(len(prompts), t) % 3
    copied, lengths, state = suffix_matches(tokens, join(states), memory, backend=backend)
    for row, alone in enumerate(states):
        c, n, own = suffix_matches(tokens[row : row + 1], alone, memory, backend=backend)
        assert torch.equal(copied[row], c[0]) and torch.equal(lengths[row], n[0])
        kept = own.tokens.shape[1]
        padded = state.tokens[row, : state.tokens.shape[1] - kept]
        assert torch.equal(state.tokens[row, len(padded) :], own.tokens[0]) and not padded.any()
        assert state.position[row] == own.position[0] == len(prompts[row]) + t
    counts = [int(p) - remembers_from(int(p), memory) for p in state.position]
    assert state.tokens.shape[1] == max(counts)
    last = rows(state, [len(prompts) - 1])
    again = suffix_matches(tokens[-1:], last, memory, backend=backend)
    assert same(again, suffix_matches(tokens[-1:], own, memory, backend=backend))


@pytest.mark.parametrize("backend", FAST)
@given(texts, texts, texts, memories)
def test_a_kept_state_goes_on_with_other_tokens(
    backend: Backend, prompt: list[int], draft: list[int], other: list[int], memory: int | None
) -> None:
    _, _, kept = suffix_matches(torch.tensor([prompt]), memory=memory, backend=backend)
    before = [tensor.clone() for tensor in kept]
    suffix_matches(torch.tensor([draft]), kept, memory, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(kept, before, strict=True))
    copied, lengths, state = suffix_matches(torch.tensor([other]), kept, memory, backend=backend)
    whole = suffix_matches(torch.tensor([prompt + other]), memory=memory, backend="definition")
    assert same((copied, lengths, state), (whole[0][:, len(prompt) :], whole[1][:, len(prompt) :], whole[2]))


@pytest.mark.parametrize("backend", FAST)
@given(texts, st.data(), memories)
def test_later_tokens_change_nothing_earlier(
    backend: Backend, text: list[int], data: st.DataObject, memory: int | None
) -> None:
    at = data.draw(st.integers(0, len(text) - 1))
    changed = [*text[:at], *data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=40))]
    first, second = (suffix_matches(torch.tensor([x]), memory=memory, backend=backend) for x in (text, changed))
    assert all(torch.equal(a[:, :at], b[:, :at]) for a, b in zip(first[:2], second[:2], strict=True))


@needs_kernels
@pytest.mark.parametrize("memory", [None, 200])
@pytest.mark.parametrize("t", [10, 600])
def test_a_batch_on_any_number_of_threads_is_its_rows(text: str, memory: int | None, t: int) -> None:
    characters = torch.tensor([ord(c) for c in text[: 9 * 800]]).view(9, 800)
    _, _, state = suffix_matches(characters[:, :-t], memory=memory)
    by_threads = []
    for threads in (1, 4):
        with threads_of_torch(threads):
            by_threads.append(suffix_matches(characters[:, -t:], state, memory, backend="native"))
    assert same(*by_threads)
    copied, lengths, _ = by_threads[0]
    for row in range(9):
        alone = suffix_matches(characters[row : row + 1], memory=memory, backend="python")
        assert torch.equal(alone[0][0, -t:], copied[row]) and torch.equal(alone[1][0, -t:], lengths[row])


@needs_kernels
@pytest.mark.parametrize("memory", [None, 32])
@pytest.mark.parametrize("begin", [0, 20, 70])
def test_rows_that_are_stepped(text: str, memory: int | None, begin: int) -> None:
    """What a decoder keeps alive: buffers, begun from a state, take a token at a time."""
    tokens = torch.tensor([ord(c) for c in text[: 3 * 200]]).view(3, 200)
    tokens[2] = 0
    whole = suffix_matches(tokens, memory=memory)
    _, _, state = suffix_matches(tokens[:, :begin], memory=memory)
    capacity = 200 if memory is None else memory
    words = native.kernels().suffix_automaton_words  # type: ignore[union-attr]
    words.argtypes, words.restype = [ctypes.c_int64], ctypes.c_int64
    buffers = torch.full((3, words(capacity)), -7, dtype=torch.int32)
    remembered = state.tokens[..., 0].contiguous()
    before = torch.full((3,), remembered.shape[1])
    native.call("suffix_begin", buffers, remembered, before, *buffers.shape, remembered.shape[1], capacity)
    copied, lengths = torch.empty(3, dtype=torch.int64), torch.empty(3, dtype=torch.int64)
    for at in range(begin, 200):
        native.call("suffix_step", buffers, tokens[:, at].contiguous(), copied, lengths, *buffers.shape)
        assert torch.equal(copied, whole[0][:, at]) and torch.equal(lengths, whole[1][:, at])


def test_states_own_their_memory_and_stay_within_it() -> None:
    state = initial_state(2)
    assert (state.tokens.shape, state.position.tolist()) == ((2, 0, 1), [0, 0])
    for size in (3, 40, 1, 7, 100):
        _, _, state = suffix_matches(torch.zeros(2, size, dtype=torch.int32), state, 16)
        assert state.tokens.dtype == torch.int64
        assert nbytes(state) == sum(tensor.nbytes for tensor in state) <= 2 * (16 + 1) * 8


def test_nothing_at_all() -> None:
    for shape in ((0, 5), (2, 0), (0, 0)):
        for backend in ("definition", *FAST):
            copied, lengths, state = suffix_matches(torch.zeros(shape, dtype=torch.int64), backend=backend)
            assert copied.shape == lengths.shape == shape
            assert state.tokens.shape[:2] == (shape[0], shape[1] if shape[0] else 0)


TOKENS = torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((TOKENS, None, 7), r"memory: got 7; allowed: an even number"),
        ((TOKENS, None, 0), r"memory: got 0; allowed: an even number"),
        ((TOKENS, None, 2.0), r"memory: got 2\.0; allowed: an even number"),
        ((TOKENS[0],), r"got tokens \(3,\) in int64; allowed: \(b, t\)"),
        ((TOKENS.float(),), r"got tokens \(2, 3\) in float32; allowed: .* int64 or int32"),
        ((TOKENS - 1,), r"got tokens -1\.\.-1; allowed: 0\.\.2147483647"),
        ((TOKENS + 2**31,), r"got tokens 2147483648\.\.2147483648; allowed: 0\.\."),
        ((TOKENS, initial_state(3)), r"state: got \(3, 0, 1\) at tokens; allowed there: \(2, 0, 1\)"),
        ((TOKENS, initial_state(2)._replace(position=torch.tensor([0, 4]))), r"state: got 0 remembered tokens; 4 are"),
        ((TOKENS, initial_state(2)._replace(position=torch.tensor([0, -4]))), r"state: got positions \[0, -4\]"),
        ((TOKENS, None, 2**40), r"got 1,099,511,627,776 tokens to remember; allowed: 536,870,912"),
    ],
)
def test_wrong_inputs(unchecked: None, arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(InputError, match=message) as refused:
        suffix_matches(*arguments)  # type: ignore[arg-type]
    assert "\n" not in str(refused.value)


def test_a_longest_match_of_nothing() -> None:
    with pytest.raises(InputError, match="longest: got 0; allowed: 1 token or more"):
        suffix_matches(TOKENS, longest=0)


def test_a_backend_by_name(unchecked: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"backend: got 'fast'; allowed: auto, definition, python, native"):
        suffix_matches(TOKENS, backend="fast")  # type: ignore[arg-type]
    monkeypatch.setattr(native, "kernels", lambda: None)
    with pytest.raises(InputError, match=r"backend 'native' needs the compiled kernels.*'python' runs everywhere"):
        suffix_matches(TOKENS, backend="native")


@pytest.fixture
def first_warning() -> Iterator[None]:
    suffix_automaton._warn_slow.cache_clear()
    yield
    suffix_automaton._warn_slow.cache_clear()


def test_without_a_compiler_its_slowness_is_said_once(first_warning: None, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = suffix_matches(TOKENS, backend="definition")
    monkeypatch.setattr(native, "kernels", lambda: None)
    with pytest.warns(UserWarning, match="suffix_matches runs in Python"):
        assert same(suffix_matches(TOKENS), exact)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(suffix_matches(TOKENS), exact)


def test_de_bruijn_has_every_word_once() -> None:
    word = de_bruijn(8)
    assert len(word) == 2**8
    assert len({tuple((word * 2)[i : i + 8]) for i in range(len(word))}) == len(word)
