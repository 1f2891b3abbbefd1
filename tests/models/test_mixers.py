"""Laws that every mixer of the registry keeps, in every form a configuration can ask for."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kmixer.errors import InputError
from kmixer.layers.measured import Attention, Learned
from kmixer.layers.roles import roles_of
from kmixer.models.mixers.card import Place
from kmixer.models.mixers.choice import MixerName, MixersConfig, build_mixer
from kmixer.models.mixers.registry import CARDS, CAUSAL_NAMES
from kmixer.state import State, join, rows
from kmixer.trail import Trail
from tests.models.laws import (
    assert_a_split_gives_the_whole,
    assert_close,
    assert_owns_its_memory,
    draw_cuts,
    draw_rows,
    of_layer,
    one_at_a_time,
)

WIDTH = 12
Form = tuple[MixerName, dict[str, Any], dict[str, Any]]
# A mixer, its settings, and the place it stands in: every mixer of the registry as it is, and other forms of some.
FORMS: list[Form] = [
    *((name, {}, {}) for name in CAUSAL_NAMES),
    ("softmax", {}, {"window": 4}),
    ("softmax", {"query_key_norm": True}, {"window": 3, "window_inclusive": True, "bias": True}),
    ("softmax", {"tie_query_key": True}, {}),
    ("softmax", {"tie_query_key": True, "value_projection": False}, {"rotary": False}),
    ("softmax", {"convolution": 4}, {}),
    ("softmax", {"convolution": 3, "value_projection": False}, {"window": 4, "bias": True}),
    ("gaussian", {"value_source": "pre_rope"}, {"window": 5}),
    ("gaussian", {"exclude_self": True, "backend": "naive"}, {"window": 3}),
    ("gaussian", {"head_norm": False, "initial_sigma": 1.5}, {"rotary": False, "bias": True}),
    ("hierarchical", {"levels": 4, "taps": 3, "downsampling": "dense"}, {"rotary": False, "bias": True}),
    ("hierarchical", {"levels": 2, "fusion": "output", "convolution_head": True}, {}),
    ("hierarchical", {"levels": 2, "taps": 1, "downsampling": "average"}, {}),
    ("hierarchical", {"levels": 3, "fixed_weights": [0.2, 0.4, 0.4]}, {}),
    ("k2", {"rank": 3}, {}),
    ("k2", {"rank": 2, "base_kernel": {"kind": "toeplitz", "size": 5, "shared": False}, "output_gate": True}, {}),
    ("k2", {"rank": 2, "base_kernel": {"kind": "none", "shared": False}}, {}),
]
# Of mixers that are built for no place that sees the past only.
BOTH_WAYS: list[Form] = [
    ("sinkhorn", {}, {"causal": False}),
    ("sinkhorn", {"iterations": 3, "tie_query_key": True}, {"causal": False, "bias": True}),
    ("sinkhorn", {"iterations": 1, "learned_temperature": True}, {"causal": False, "rotary": False}),
]
forms = pytest.mark.parametrize("form", FORMS, ids=str)
all_forms = pytest.mark.parametrize("form", [*FORMS, *BOTH_WAYS], ids=str)


def make_mixer(form: Form, **place: Any) -> Any:
    name, settings, where = form
    torch.manual_seed(0)
    config = MixersConfig.parse({"heads": 3, name: settings}, source="test")
    mixer = build_mixer(name, config, Place(WIDTH, **{**where, **place})).double()
    for parameter in mixer.parameters():  # away from the start of training, so that every path matters
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.5)
    return mixer


def inputs(t: int, b: int = 2) -> Tensor:
    return torch.randn(b, t, WIDTH, generator=torch.Generator().manual_seed(t), dtype=torch.float64)


def test_a_configuration_names_the_mixers_of_the_registry_and_holds_settings_of_each() -> None:
    assert set(get_args(MixerName)) == set(CARDS) == {name for name, _, _ in [*FORMS, *BOTH_WAYS]}
    fields = MixersConfig.model_fields
    assert list(fields) == ["mixers", "heads", *CARDS]
    for name, card in CARDS.items():
        assert (card.name, fields[name].annotation, fields[name].default) == (name, card.settings, card.settings())
        assert isinstance(make_mixer((name, {}, {}), causal=not card.refuses_causal), card.layer)


@forms
@given(st.integers(1, 40), st.data())
def test_any_split_gives_the_whole(form: Any, t: int, data: st.DataObject) -> None:
    mixer, x = make_mixer(form), inputs(t)
    assert_a_split_gives_the_whole(of_layer(mixer, x), t, draw_cuts(data, t), start=mixer.initial_state(2))


@forms
def test_one_at_a_time_gives_the_whole(form: Any) -> None:
    assert_a_split_gives_the_whole(of_layer(make_mixer(form), inputs(30)), 30, one_at_a_time(30))


@forms
@settings(max_examples=10)
@given(data=st.data())
@torch.no_grad()
def test_a_trail_has_the_state_after_any_part_by_row(form: Any, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32]))
    mixer = make_mixer(form).to(dtype)
    positions, n, lengths = draw_rows(data)
    x = torch.randn(len(positions), 32, WIDTH, generator=torch.Generator().manual_seed(n), dtype=torch.float64).to(
        dtype
    )

    def read(row: int, first: int, last: int, state: State) -> State:
        return mixer(x[row : row + 1, first:last], state)[1]

    begun = [read(row, 0, p, mixer.initial_state(1)) for row, p in enumerate(positions)]
    state = join(begun) if data.draw(st.booleans()) or any(positions) else None
    chunk = torch.cat([x[row : row + 1, p : p + n] for row, p in enumerate(positions)])
    y, logs = mixer(chunk, state, trail=True)
    expected_y, after = mixer(chunk, state)
    assert torch.equal(y, expected_y)
    trail = Trail(logs, len(positions), n)
    assert_close(trail.at(torch.full((len(positions),), n)), after)
    kept = trail.at(torch.tensor(lengths))
    ways = enumerate(zip(positions, lengths, strict=True))
    assert_close(kept, join([read(row, p, p + k, begun[row]) for row, (p, k) in ways]))
    assert_owns_its_memory(kept)
    # From there, a trail again.
    _, logs = mixer(chunk, kept, trail=True)
    again = Trail(logs, len(positions), n).at(torch.tensor(lengths).flip(0))
    mine = [mixer(chunk[row : row + 1, :k], rows(kept, [row]))[1] for row, k in enumerate(reversed(lengths))]
    assert_close(again, join(mine))


@forms
def test_it_is_causal_and_rows_are_independent(form: Any) -> None:
    mixer, x = make_mixer(form), inputs(40, b=3)
    before, _ = mixer(x)
    changed = x.clone()
    changed[1, 20] += torch.linspace(-1, 1, WIDTH)
    after, _ = mixer(changed)
    torch.testing.assert_close(before[:, :20], after[:, :20], rtol=0, atol=1e-12)
    torch.testing.assert_close(before[[0, 2]], after[[0, 2]], rtol=0, atol=1e-12)
    assert not torch.allclose(before[1, 21], after[1, 21])
    for row in range(3):
        torch.testing.assert_close(mixer(x[row : row + 1])[0], before[row : row + 1], rtol=1e-10, atol=1e-10)


@forms
def test_right_padding_changes_no_row(form: Any) -> None:
    mixer, x = make_mixer(form), inputs(25, b=3)
    for row, length in enumerate((25, 13, 1)):
        x[row, length:] = 1e3
    whole, _ = mixer(x)
    for row, length in enumerate((25, 13, 1)):
        alone, _ = mixer(x[row : row + 1, :length])
        torch.testing.assert_close(alone, whole[row : row + 1, :length], rtol=1e-9, atol=1e-9)


@forms
def test_a_window_ends(form: Any) -> None:
    mixer, x = make_mixer(form), inputs(40)
    reach = getattr(mixer, "reach", None)
    changed = x.clone()
    changed[:, 10] += 1
    (before, state), (after, _) = mixer(x), mixer(changed)
    if reach is None:
        assert (before[:, -1] - after[:, -1]).abs().max() > 1e-4
        return
    unseen = 10 + reach + (form[1].get("convolution") or 1) - 1  # keys carry as many inputs as the filter has taps
    torch.testing.assert_close(before[:, unseen:], after[:, unseen:], rtol=0, atol=1e-12)
    assert state.keys.shape[2] == reach - 1


@all_forms
def test_every_parameter_gets_a_gradient_also_through_the_state(form: Any) -> None:
    mixer = make_mixer(form)
    _, state = mixer(inputs(20))
    mixer(inputs(7), state)[0].square().sum().backward()
    for name, parameter in mixer.named_parameters():
        if not parameter.requires_grad:  # fixed weights of levels
            assert name == "level_logit"
            continue
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@all_forms
def test_without_gradients_the_numbers_are_the_same(form: Any) -> None:
    mixer = make_mixer(form).float()
    followed, unfollowed = [], []
    for context, outputs in ((torch.enable_grad, followed), (torch.no_grad, unfollowed)):
        with context():
            y, state = mixer(inputs(20).float())
            outputs += [y, mixer(inputs(7).float(), state)[0]]
    assert all(y.requires_grad for y in followed)
    assert not any(y.requires_grad for y in unfollowed)
    assert all(torch.equal(y, other) for y, other in zip(followed, unfollowed, strict=True))


@forms
def test_what_is_added_goes_through_the_last_matrix_and_stays_out_of_the_state(form: Any) -> None:
    mixer, x = make_mixer(form), inputs(20)
    one, other = inputs(20).flip(1), inputs(20).cos()
    y, state = mixer(x)
    with_one, state_of_one = mixer(x, added=one)
    assert (with_one - y).abs().max() > 1e-3
    torch.testing.assert_close(state_of_one, state)
    torch.testing.assert_close(mixer(x, added=one + other)[0] - with_one, mixer(x, added=other)[0] - y)
    nothing = torch.zeros_like(x)
    assert torch.equal(mixer(x, added=nothing)[0], y)
    if isinstance(state, tuple) and hasattr(state, "position"):  # rows that stand at different positions
        uneven = join([mixer(x[:1, :5])[1], mixer(x[1:])[1]])
        both, _ = mixer(x, uneven, added=one)
        for row in range(2):
            alone, _ = mixer(x[row : row + 1], rows(uneven, [row]), added=one[row : row + 1])
            torch.testing.assert_close(both[row : row + 1], alone, rtol=1e-9, atol=1e-9)


@forms
def test_bfloat16_autocast_streams(form: Any) -> None:
    mixer, x = make_mixer(form).float(), inputs(12).float()
    with torch.autocast("cpu", torch.bfloat16):
        whole, _ = mixer(x)
        first, state = mixer(x[:, :5], mixer.initial_state(2))
        second, _ = mixer(x[:, 5:], state)
        narrow, _ = mixer(x.bfloat16())  # as a stack gives it
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=0.03, atol=0.03)
    exact, _ = mixer(x)
    assert (whole.float() - exact).norm() < 0.03 * exact.norm()
    assert narrow.dtype == torch.bfloat16
    assert (narrow.float() - exact).norm() < 0.03 * exact.norm()


@forms
def test_no_position_leaves_the_state(form: Any) -> None:
    mixer = make_mixer(form)
    _, state = mixer(inputs(5))
    y, after = mixer(inputs(0), state)
    assert y.shape == (2, 0, WIDTH)
    torch.testing.assert_close(after, state, rtol=0, atol=0)


@pytest.mark.parametrize("name", [name for name, card in CARDS.items() if card.sees_both_ways])
def test_without_causal_every_position_sees_all(name: MixerName) -> None:
    mixer, x = make_mixer((name, {}, {"rotary": False}), causal=False), inputs(9)
    y, state = mixer(x)
    changed = x.clone()
    changed[:, 8] += 1
    assert ((mixer(changed)[0] - y).abs().amax((0, 2)) > 1e-6).all()
    with pytest.raises(InputError, match="state: a layer with causal=False sees all positions at once and takes none"):
        mixer(x, () if state is None else state)


@pytest.mark.parametrize("name", ["softmax", "gaussian", "sinkhorn"])
def test_without_causal_and_positions_order_does_not_matter(name: MixerName) -> None:
    mixer, x = make_mixer((name, {}, {"rotary": False}), causal=False), inputs(9)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(mixer(x[:, order])[0], mixer(x)[0][:, order])


@pytest.mark.parametrize("name", [name for name, card in CARDS.items() if not card.sees_both_ways])
def test_a_mixer_of_the_past_only_is_refused_where_all_is_seen(name: MixerName) -> None:
    with pytest.raises(InputError, match=f"mixer {name} mixes with the past only; allowed here: gaussian, hierarch"):
        make_mixer((name, {}, {}), causal=False)


@pytest.mark.parametrize("name", [name for name, card in CARDS.items() if card.refuses_causal])
def test_a_mixer_that_cannot_see_the_past_only_is_refused_where_it_would_have_to(name: MixerName) -> None:
    with pytest.raises(InputError, match=rf"mixer {name} needs .*; allowed here: gaussian, hierarchical, k2, softmax$"):
        make_mixer((name, {}, {}))


@all_forms
def test_every_parameter_has_a_role(form: Form) -> None:
    mixer = make_mixer(form)
    roles = roles_of(mixer)
    assert list(roles) == [name for name, _ in mixer.named_parameters()]
    for name, parameter in mixer.named_parameters():
        matrix = roles[name].matrix
        if matrix is not None:
            assert parameter.ndim == 2 and parameter.shape[matrix.outputs] % matrix.parts == 0, name


@forms
def test_the_state_is_as_large_as_the_card_says(form: Form) -> None:
    mixer, card = make_mixer(form), CARDS[form[0]]
    a_token, constant = card.state_numbers(mixer)
    assert bool(a_token) == card.state_grows
    for t in (32, 64):
        kept = t if form[2].get("window") is None else mixer.reach - 1
        assert numbers_of(mixer(inputs(t, b=1))[1]) == constant + kept * a_token


def numbers_of(state: Any) -> int:
    """Numbers of what a sequence keeps; positions are not among them."""
    if isinstance(state, Tensor):
        return state.numel() if state.is_floating_point() else 0
    return sum(map(numbers_of, state)) if isinstance(state, tuple) else 0


@all_forms
def test_operations_are_finite_and_grow_with_what_is_seen(form: Form) -> None:
    mixer, card = make_mixer(form), CARDS[form[0]]
    short, long = (card.operations(mixer, window) for window in (8, 64))
    assert 0 < short <= long <= card.operations(mixer, 64, every_key=True)


@all_forms
def test_what_is_measured_of_it_are_numbers(form: Form) -> None:
    mixer, x = make_mixer(form), inputs(7)
    values = mixer.learned() if isinstance(mixer, Learned) else {}
    assert json.loads(json.dumps(values)) == values
    weights = mixer.attention_weights(x) if isinstance(mixer, Attention) else None
    if weights is not None:
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1], dtype=weights.dtype))
        assert bool((weights.triu(1) == 0).all()) == form[2].get("causal", True)
