"""Fast weights keep their laws: chunks, streams and the token form are one definition, and rows share nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kmixer.errors import InputError
from kmixer.layers import FastWeights
from kmixer.layers.fast_weights import FastState
from kmixer.ops.decay.recurrence import decayed_linear_attention
from kmixer.ops.fast_weights import fast_weights, filtered
from kmixer.state import join, rows
from kmixer.trail import Trail
from tests.models.laws import assert_a_split_gives_the_whole, assert_close, draw_cuts, draw_rows, one_at_a_time

D, WIDE = 6, 10
FORMS: list[dict[str, Any]] = [
    {"chunk": 4},
    {"chunk": 3, "tau": None, "taps": 3, "target": "hidden"},
    {"chunk": 5, "max_norm": 0.7},
    {"chunk": 4, "reset_every": 10},
    {"chunk": 1},
    {"chunk": 1, "tau": None, "reset_every": 7, "target": "hidden"},
]
forms = pytest.mark.parametrize("form", FORMS, ids=str)
by_chunk = pytest.mark.parametrize("form", [form for form in FORMS if form["chunk"] > 1], ids=str)


def make(**form: Any) -> FastWeights:
    """Away from the start of training, so that every part matters."""
    torch.manual_seed(0)
    fast = FastWeights(D, WIDE, **{"rate": 0.3, **form}).double()
    for parameter in fast.parameters():
        nn.init.normal_(parameter, std=0.6)
    return fast


def inputs(t: int, b: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Z, T and W_0."""
    generator = torch.Generator().manual_seed(100 * t + seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return draw(b, t, WIDE), draw(b, t, D), draw(D, WIDE)


def one_by_one(fast: FastWeights, hidden: Tensor, targets: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The definition: position by position, row by row; what is added, and F at the end."""
    if fast.source == "embed":
        targets = F.rms_norm(targets, (D,), eps=1e-8)
    c, decay = fast.chunk, fast.decay()
    outputs, finals = [], []
    for z, t in zip(hidden, targets, strict=True):
        learned, begin, y = z.new_zeros(D, WIDE), 0, []
        for i in range(len(z)):
            if fast.reset_every is not None and i and i % fast.reset_every == 0:
                learned, begin = torch.zeros_like(learned), i
            if fast.filter is None:
                unit = z / z.norm(dim=1, keepdim=True)
                learned = learned * decay
                if i > begin:
                    learned = learned + fast.rate * torch.outer(t[i] @ fast.target, unit[i - 1])
                y.append(learned @ unit[i])
                continue
            y.append(learned @ z[i])
            if (i + 1 - begin) % c == 0:
                taps = fast.filter.shape[1]
                written = torch.zeros_like(learned)
                for j in range(i + 1 - c, i + 1):
                    near = range(max(i + 1 - c, j - taps // 2), min(i, j + taps // 2) + 1)
                    v = sum(fast.filter[:, k - j + taps // 2] * t[k] for k in near)
                    written = written + fast.rate * torch.outer(v @ fast.target, z[j])
                learned = decay * learned + written
                if fast.max_norm is not None:
                    learned = learned * (fast.max_norm * weight.norm() / learned.norm()).clamp(max=1)
        if fast.reset_every is not None and len(z) % fast.reset_every == 0:
            learned = torch.zeros_like(learned)
        outputs.append(torch.stack(y))
        finals.append(learned)
    return torch.stack(outputs), torch.stack(finals)


def learned(state: FastState) -> Tensor:
    """F (b, d, f)."""
    return state.weights.mT


@forms
@given(t=st.integers(1, 33))
def test_it_is_its_definition_position_by_position(form: dict[str, Any], t: int) -> None:
    fast, (hidden, targets, weight) = make(**form), inputs(t)
    y, state = fast(hidden, targets, weight)
    expected, final = one_by_one(fast, hidden, targets, weight)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(learned(state), final, rtol=1e-12, atol=1e-12)


@forms
@given(t=st.integers(1, 33), data=st.data())
def test_any_split_gives_the_whole(form: dict[str, Any], t: int, data: st.DataObject) -> None:
    fast, (hidden, targets, weight) = make(**form), inputs(t)

    def call(part: slice, state: Any) -> Any:
        return fast(hidden[:, part], targets[:, part], weight, state)

    for cuts in (draw_cuts(data, t), one_at_a_time(t)):
        assert_a_split_gives_the_whole(call, t, cuts, start=fast.initial_state(2), tolerance=1e-12)


@given(n=st.integers(1, 6), c=st.integers(1, 5), decay=st.sampled_from([0.0, 0.6, 1.0]))
def test_the_dual_form_without_the_weights_gives_the_same(n: int, c: int, decay: float) -> None:
    """Chunk-delayed linear attention: Z_i (Z_j^T V_j) over the chunks j before, by lambda^(i-1-j)."""
    hidden, targets, _ = inputs(n * c)
    taps, matrix = inputs(D, b=1)[0][0][:, :3], inputs(D, b=1)[1][0]
    values = filtered(targets.unflatten(1, (n, c)), taps).flatten(1, 2) @ matrix
    forgets = torch.tensor(decay).double()
    chunks = (hidden.unflatten(1, (n, c)), targets.unflatten(1, (n, c)))
    nothing = torch.zeros(2, WIDE, D, dtype=torch.float64)
    y, after = fast_weights(*chunks, taps, matrix, nothing, forgets, rate=0.3)
    of = torch.arange(n * c) // c
    lag = of[:, None] - 1 - of[None, :]
    weights = torch.where(lag >= 0, forgets ** lag.clamp(min=0), 0.0)
    expected = 0.3 * (hidden @ hidden.mT * weights) @ values
    torch.testing.assert_close(y.flatten(1, 2), expected, rtol=1e-12, atol=1e-12)
    if decay == 0:  # only the last chunk is remembered
        last = 0.3 * hidden[:, -c:].mT @ values[:, -c:]
        torch.testing.assert_close(after[:, -1], last, rtol=1e-12, atol=1e-12)


def reached(fast: FastWeights, t: int, changed: int) -> list[int]:
    """The positions whose output is not bit for bit the same after a change of the input at one position."""
    hidden, targets, weight = inputs(t, b=1)
    before, _ = fast(hidden, targets, weight)
    hidden, targets = hidden.clone(), targets.clone()
    hidden[:, changed] += 1
    targets[:, changed] -= torch.linspace(-1, 2, D)
    after, _ = fast(hidden, targets, weight)
    return [i for i in range(t) if not torch.equal(before[:, i], after[:, i])]


@given(changed=st.integers(0, 20))
def test_a_position_reaches_itself_and_the_chunks_after_its_own(changed: int) -> None:
    c, t = 4, 21
    first = changed // c * c + c
    own = [changed] if changed >= c else []  # before that F is zero
    full = range(first, t) if first < t else range(0)
    assert reached(make(chunk=c), t, changed) == [*own, *full]


def test_a_filter_that_crosses_the_border_of_a_chunk_reads_what_it_may_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: with taps up to +2 over the border, position 4 reaches 3 and more before it."""

    def crossing(targets: Tensor, taps: Tensor) -> Tensor:
        c = targets.shape[-2]
        return filtered(targets.flatten(1, 2), taps).unflatten(1, (-1, c))

    monkeypatch.setattr("kmixer.ops.fast_weights.filtered", crossing)
    # Position 9 is the second of chunk 2: by +2 it enters what chunk 1 writes, which chunk 2 reads: position 8 too.
    assert 8 in reached(make(chunk=4), 21, 9)


@by_chunk
def test_a_sequence_within_a_chunk_is_unchanged(form: dict[str, Any]) -> None:
    fast, (hidden, targets, weight) = make(**form), inputs(form["chunk"])
    assert not fast(hidden, targets, weight)[0].any()


@forms
@given(data=st.data())
def test_packed_documents_with_resets_are_separate_ones(form: dict[str, Any], data: st.DataObject) -> None:
    fast, t = make(**form), 24
    hidden, targets, weight = inputs(t)
    begins = [sorted({0, *data.draw(st.lists(st.integers(1, t - 1), max_size=3))}) for _ in range(2)]
    reset = torch.zeros(2, t, dtype=torch.bool)
    apart = torch.zeros(2, t, D, dtype=torch.float64)
    for row, firsts in enumerate(begins):
        reset[row, firsts] = True
        for first, last in zip(firsts, [*firsts[1:], t], strict=True):
            part = (slice(row, row + 1), slice(first, last))
            apart[part] = fast(hidden[part], targets[part], weight)[0]
    packed, _ = fast(hidden, targets, weight, reset=reset)
    torch.testing.assert_close(packed, apart, rtol=1e-12, atol=1e-12)
    _, after = fast(hidden, targets, weight)
    packed, _ = fast(hidden, targets, weight, after, reset=reset)
    torch.testing.assert_close(packed, apart, rtol=1e-12, atol=1e-12)


def test_without_a_reset_documents_run_into_each_other() -> None:
    fast, (hidden, targets, weight) = make(chunk=4), inputs(24)
    reset = torch.zeros(2, 24, dtype=torch.bool)
    reset[:, 9] = True
    assert not torch.allclose(fast(hidden, targets, weight)[0], fast(hidden, targets, weight, reset=reset)[0])
    with pytest.raises(InputError, match="reset: got some with trail=True"):
        fast(hidden, targets, weight, reset=reset, trail=True)


@torch.no_grad()
def test_forgetting_bounds_what_is_learned_and_without_it_nothing_does() -> None:
    """|F| <= max |D| / (1 - lambda); with the same text again and again and tau = null, it grows in proportion."""
    hidden, targets, weight = (part.repeat(1, 50, 1) if part.ndim == 3 else part for part in inputs(8))
    for tau in (600.0, None):
        fast = make(chunk=4, tau=tau)
        _, state = fast(hidden, targets, weight)
        once = max(
            float(fast(hidden[:, i : i + 4], targets[:, i : i + 4], weight)[1].weights.norm(dim=(1, 2)).max())
            for i in (0, 4)
        )
        norms = state.weights.norm(dim=(1, 2))
        if tau is not None:
            assert (norms <= once / (1 - fast.decay())).all()
        else:
            assert fast.decay() == 1
            _, half = fast(hidden[:, :200], targets[:, :200], weight)
            torch.testing.assert_close(norms, 2 * half.weights.norm(dim=(1, 2)))


@given(t=st.integers(5, 60), bound=st.sampled_from([1e-3, 0.1, 1.0]))
@torch.no_grad()
def test_the_bound_holds_after_every_chunk(t: int, bound: float) -> None:
    fast, (hidden, targets, weight) = make(chunk=4, max_norm=bound, rate=2.0), inputs(t)
    _, logs = fast(hidden, targets, weight, trail=True)
    norms = torch.stack([Trail(logs, 2, t).at(torch.tensor([k, k])).weights.norm(dim=(1, 2)) for k in range(t + 1)])
    assert float(norms.max()) <= bound * float(weight.norm()) * (1 + 1e-12)
    if bound < 1:
        assert float(norms.max()) >= bound * float(weight.norm()) * (1 - 1e-12)


@torch.no_grad()
def test_another_chunk_writes_the_same_pairs_but_those_across_its_ends() -> None:
    """Nothing forgotten, chunks of 16 hold what chunks of 64 hold, less each pair with an end of 16 between its two."""
    t, tokens = 128, [(i, i + offset, 2 + offset) for i in range(128) for offset in range(-2, 3)]
    hidden, targets, weight = inputs(t)
    held = {}
    for chunk in (16, 64):
        fast = make(chunk=chunk, tau=None)
        held[chunk] = fast(hidden, targets, weight)[1].weights
    sources = F.rms_norm(targets, (D,), eps=1e-8)

    def pairs(within: int, beyond: int | None) -> Tensor:
        """Of positions in one chunk of this length, and in two of the other."""
        total = torch.zeros(2, WIDE, D, dtype=torch.float64)
        for i, other, tap in tokens:
            if 0 <= other < t and i // within == other // within and (not beyond or i // beyond != other // beyond):
                value = (fast.filter[:, tap] * sources[:, other]) @ fast.target
                total += fast.rate * hidden[:, i, :, None] * value[:, None]
        return total

    torch.testing.assert_close(held[64], pairs(64, None), rtol=1e-12, atol=1e-12)
    missing = pairs(64, 16)
    torch.testing.assert_close(held[64] - held[16], missing, rtol=1e-10, atol=1e-12)
    assert 0.02 < missing.norm() / held[64].norm() < 0.5


def test_one_position_a_chunk_is_the_operator_of_decays() -> None:
    fast, (hidden, targets, weight) = make(chunk=1), inputs(30)
    units = F.normalize(hidden, dim=-1)
    keys = F.pad(units, (0, 0, 1, 0))[:, :-1]
    values = fast.rate * F.rms_norm(targets, (D,), eps=1e-8) @ fast.target
    expected, final = decayed_linear_attention(units, keys, values, torch.log(fast.decay()), backend="recurrent")
    y, state = fast(hidden, targets, weight)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state.weights, final, rtol=1e-12, atol=1e-12)


@forms
def test_gradients_of_all_inputs_parameters_and_the_state(form: dict[str, Any]) -> None:
    fast, (hidden, targets, weight) = make(**form), inputs(11)
    _, state = fast(*inputs(9, seed=1)[:2], weight)
    parameters = dict(fast.named_parameters())

    def call(hidden: Tensor, targets: Tensor, weight: Tensor, learned: Tensor, *values: Tensor) -> Any:
        own = dict(zip(parameters, values, strict=True))
        given = state._replace(weights=learned)
        y, after = torch.func.functional_call(fast, own, (hidden, targets, weight, given))
        return y, after.weights

    leaves = [hidden, targets, weight, state.weights.detach(), *(p.detach() for p in parameters.values())]
    torch.autograd.gradcheck(call, [leaf.clone().requires_grad_() for leaf in leaves])


def test_from_a_zero_filter_the_filter_learns_and_the_target_waits() -> None:
    fast, (hidden, targets, weight) = FastWeights(D, WIDE, chunk=4).double(), inputs(20)
    y, _ = fast(hidden, targets, weight)
    assert not y.any()
    y.sum().backward()
    assert fast.target.grad is not None and not fast.target.grad.any()
    assert fast.filter.grad.abs().min() > 0


@pytest.mark.parametrize(("offset", "taught"), [(1, "next"), (0, "own")])
def test_one_write_adds_the_rate_to_one_logit(offset: int, taught: str) -> None:
    """Orthonormal keys and embeddings, one tap, W_t = I."""
    d = WIDE
    fast = FastWeights(d, d, chunk=d // 2, rate=0.3, tau=None, target="hidden").double()
    with torch.no_grad():
        fast.filter.zero_()[:, 2 + offset] = 1
        fast.target.copy_(torch.eye(d))
    keys, embeddings = (torch.linalg.qr(inputs(d, b=1, seed=seed)[0][0])[0] for seed in (1, 2))
    tokens = torch.arange(d // 2)
    hidden = keys[: d // 2].repeat(2, 1)[None]  # the second chunk asks with the keys of the first
    y, _ = fast(hidden, embeddings[tokens].repeat(2, 1)[None], torch.zeros(d, d, dtype=torch.float64))
    logits = y[0, d // 2 :] @ embeddings.T
    expected = torch.zeros(d // 2, d, dtype=torch.float64)
    for i in range(d // 2):
        if i + offset < d // 2:  # the last of a chunk has no next token
            expected[i, i + offset] = 0.3
    torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12), taught


def test_the_next_token_is_taught_from_the_first_step() -> None:
    fast = FastWeights(D, WIDE, chunk=4, init="next")
    assert fast.filter.sum() == D == fast.filter[:, 3].sum()
    torch.testing.assert_close(fast.target.detach(), 0.1 * torch.eye(D))


@forms
def test_what_is_learned_is_float32_under_autocast(form: dict[str, Any]) -> None:
    fast = make(**form).float()
    hidden, targets, weight = (part.float() for part in inputs(40))
    exact, _ = fast(hidden, targets, weight)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = fast(hidden.bfloat16(), targets, weight)
    assert (y.dtype, state.weights.dtype) == (torch.bfloat16, torch.float32)
    assert (y.float() - exact).norm() < 0.02 * exact.norm()


def test_ten_thousand_chunks_stay_close_to_float64() -> None:
    fast, (hidden, targets, weight) = make(chunk=2, tau=99_000.0), inputs(20_000, b=1)
    _, exact = fast(hidden, targets, weight)
    _, state = fast.float()(hidden.float(), targets.float(), weight.float())
    assert (state.weights - exact.weights).norm() < 1e-3 * exact.weights.norm()


@forms
@settings(max_examples=20)
@given(data=st.data())
@torch.no_grad()
def test_a_trail_has_the_state_after_any_part_by_row(form: dict[str, Any], data: st.DataObject) -> None:
    """And rows are chosen, repeated and joined while they stand at different places of their chunks."""
    fast = make(**form)
    positions, n, lengths = draw_rows(data)
    hidden, targets, weight = inputs(40, b=len(positions))

    def read(row: int, first: int, last: int, state: Any) -> Any:
        part = (slice(row, row + 1), slice(first, last))
        return fast(hidden[part], targets[part], weight, state)

    begun = [read(row, 0, p, fast.initial_state(1))[1] for row, p in enumerate(positions)]
    parts = [(slice(row, row + 1), slice(p, p + n)) for row, p in enumerate(positions)]
    both = (torch.cat([hidden[part] for part in parts]), torch.cat([targets[part] for part in parts]))
    state = join(begun)
    y, logs = fast(*both, weight, state, trail=True)
    plain, after = fast(*both, weight, state)
    assert torch.equal(y, plain)
    alone = [read(row, p, p + n, begun[row])[0] for row, p in enumerate(positions)]
    torch.testing.assert_close(y, torch.cat(alone), rtol=1e-12, atol=1e-12)
    trail = Trail(logs, len(positions), n)
    assert_close(trail.at(torch.full((len(positions),), n)), after)
    kept = trail.at(torch.tensor(lengths))
    ways = enumerate(zip(positions, lengths, strict=True))
    assert_close(kept, join([read(row, p, p + k, begun[row])[1] for row, (p, k) in ways]))
    turned = torch.arange(len(positions)).flip(0)
    y, _ = fast(*(part[turned] for part in both), weight, rows(state, turned))
    torch.testing.assert_close(y, plain[turned], rtol=1e-12, atol=1e-12)
