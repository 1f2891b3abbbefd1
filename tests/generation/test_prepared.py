"""The prepared decoder is the model, one token at a time; whatever it does not know goes through the model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import kmixer
from kmixer import native
from kmixer.errors import InputError
from kmixer.generation.decoder import Decoder, EagerDecoder, open_decoder
from kmixer.generation.prepared import PreparedDecoder, can_prepare, why_not_prepared
from kmixer.models import ModelConfig, TransformerConfig
from kmixer.state import State, join, map_tensors, rows
from kmixer.state import tensors as tensors_of
from tests.changed_parts import change

VOCABULARY = 37

MODELS: dict[str, dict[str, Any]] = {
    "conv": {"base_kernel": {"kind": "conv", "size": 8}, "copy_gate": True},
    "one tap, a kernel a layer": {"base_kernel": {"kind": "conv", "size": 1, "shared": False}},
    "toeplitz, one alpha": {"base_kernel": {"kind": "toeplitz", "size": 40}, "decay": {"alpha": "per_layer"}},
    "no kernel, factorised": {"base_kernel": {"kind": "none"}, "embedding_width": 10},
    "refined": {"base_kernel": {"kind": "conv"}, "refinement": {"steps": 3}},
    "gated": {"base_kernel": {"kind": "conv"}, "output_gate": True},
    "gelu head": {"base_kernel": {"kind": "conv"}, "head": {"kind": "gelu", "multiplier": 3}},
    "copies": {"base_kernel": {"kind": "conv"}, "copy_memory": {"memory": 8, "match_length": "gate"}},
    "copies, refined, gelu head": {
        "refinement": {"steps": 2},
        "head": {"kind": "gelu", "multiplier": 2},
        "copy_memory": {"layers": "last", "match_length": "both", "pointer": True},
    },
    "copies, factorised, gated": {
        "embedding_width": 10,
        "output_gate": True,
        "copy_memory": {"layers": [0], "memory": 30, "match_length": "embedding"},
    },
    "a pointer alone": {"copy_memory": {"layers": "none", "memory": 20, "pointer": True}},
    "fast weights": {"base_kernel": {"kind": "conv"}, "fast_weights": {"chunk": 4, "rate": 0.05}},
    "fast weights of what layers read, refined, copies": {
        "refinement": {"steps": 2},
        "copy_memory": {"memory": 8},
        "fast_weights": {"chunk": 7, "rate": 0.1, "tau": None, "taps": 3, "target": "hidden", "layers": [0]},
    },
    "fast weights within a bound, factorised": {
        "embedding_width": 10,
        "fast_weights": {"chunk": 5, "max_norm": 0.3, "rate": 0.5, "init": "next"},
    },
    "fast weights with resets": {"fast_weights": {"chunk": 4, "rate": 0.5, "reset_every": 10, "layers": "every"}},
    "dyt": {"base_kernel": {"kind": "conv"}, "norm": {"kind": "dyt", "alpha": 0.8}, "embedding_scale": 3.0},
    "derf with biases, refined, gelu head": {
        "refinement": {"steps": 2},
        "head": {"kind": "gelu", "multiplier": 2},
        "norm": {"kind": "derf", "bias": True},
        "embedding_scale": 0.5,
    },
    "dyt, rms at the end, factorised": {"embedding_width": 10, "norm": {"kind": "dyt", "final": "rms"}},
}
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "softmax": {"heads": 2},
    "softmax, short and long, no rotation": {"heads": 1, "windows": "SL", "window": 5, "rotary": False},
    "softmax with normed keys, a soft cap": {
        "windows": "S",
        "window": 65,
        "softmax": {"query_key_norm": True},
        "head": {"kind": "untied", "soft_cap": 3.0},
    },
    "softmax, keys that are queries, values that are inputs": {
        "softmax": {"tie_query_key": True, "value_projection": False},
        "windows": "S",
        "window": 3,
        "window_inclusive": True,
    },
    "nanochat": {"blocks": "nanochat", "value_embeddings": True, "windows": "SL", "window": 7, "layers": 3},
    "nanochat with fast weights, dyt": {
        "blocks": "nanochat",
        "norm": {"kind": "dyt", "alpha": 0.8},
        "embedding_scale": 2.0,
        "fast_weights": {"chunk": 5, "rate": 0.1, "layers": "every"},
    },
    "gaussian": {"mixers": "gaussian"},
    "gaussian, short": {"mixers": "gaussian", "windows": "S", "window": 4, "gaussian": {"value_source": "pre_rope"}},
    "gaussian without itself": {"mixers": "gaussian", "gaussian": {"exclude_self": True}, "rotary": False},
    "k2 in blocks, gated": {"mixers": "k2", "k2": {"rank": 3, "output_gate": True}},
    "all of them, copies, gelu head": {
        "mixers": ["gaussian", "k2", "softmax"],
        "layers": 3,
        "copy_memory": {"memory": 8, "match_length": "both", "pointer": True},
        "head": {"kind": "gelu", "multiplier": 2},
        "embedding_width": 10,
        "norm": {"final": "dyt"},  # neither this nor the next swallows the scale of what comes before it
        "gaussian": {"head_norm": False},
    },
    "softmax with fast weights": {"fast_weights": {"chunk": 4, "rate": 0.1, "target": "hidden"}},
}
MODELS |= {name: {"kind": "transformer", "heads": 5, **values} for name, values in TRANSFORMERS.items()}
compiled = pytest.mark.skipif(native.kernels() is None, reason="the compiled kernels were not built")


def tensors(state: State) -> list[Tensor]:
    return list(tensors_of(state))


def make_model(values: dict[str, Any], width: int = 20) -> kmixer.LanguageModel:
    torch.manual_seed(0)
    config: ModelConfig | TransformerConfig
    if values.get("kind") == "transformer":
        config = TransformerConfig.parse({"width": width, "layers": 2, **values}, source="test")
    else:
        config = ModelConfig.parse({"width": width, "layers": 2, "rank": 3, **values}, source="test")
    model = kmixer.LanguageModel(config, VOCABULARY).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 or "pointer" in name or name.endswith((".shift", "norm.bias")):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def make_tokens(b: int, t: int) -> Tensor:
    """Of five tokens, so that they repeat; the first and the last of the vocabulary among them."""
    return 9 * torch.randint(5, (b, t), generator=torch.Generator().manual_seed(b + 100 * t))


@compiled
@pytest.mark.parametrize("values", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize("batch", [1, 3, 40])
@torch.no_grad()
def test_a_prepared_step_is_the_model(values: dict[str, Any], batch: int) -> None:
    model = make_model(values)
    assert can_prepare(model)
    tokens = make_tokens(batch, 70)
    exact = make_model(values).double()
    whole = exact(tokens)
    assert whole.logits is not None
    for start in (0, 1, 30):
        state = model(tokens[:, :start]).state if start else model.initial_state(batch)
        decoder = PreparedDecoder(model, state)
        for t in range(start, 70):
            logits = decoder.advance(tokens[:, t : t + 1])
            torch.testing.assert_close(logits.double(), whole.logits[:, t : t + 1], rtol=1e-4, atol=1e-4)
        for mine, reference in zip(tensors(decoder.state()), tensors(whole.state), strict=True):
            torch.testing.assert_close(mine.double(), reference.double(), rtol=1e-4, atol=1e-4)


def decoders(kind: str) -> list[type[EagerDecoder] | type[PreparedDecoder]]:
    return [EagerDecoder, PreparedDecoder] if native.kernels() is not None and kind in MODELS else [EagerDecoder]


@pytest.mark.parametrize("kind", MODELS)
@settings(max_examples=8)
@given(data=st.data())
def test_decoders_keep_the_laws_of_a_state(kind: str, data: st.DataObject) -> None:
    """Any pieces give the whole; a state kept is as it was; restored, of other rows too, the decoder goes on there."""
    model, tokens = make_model(MODELS[kind]), make_tokens(3, 12)
    cuts = sorted(data.draw(st.lists(st.integers(0, 12), max_size=3)))
    chosen = data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=4))
    with torch.no_grad():
        whole = model(tokens).logits
    assert whole is not None
    for make in decoders(kind):
        decoder: Decoder = make(model, model.initial_state(3))
        states, pieces = [], []
        for start, stop in zip([0, *cuts], [*cuts, 12], strict=True):
            states.append((start, decoder.state()))
            pieces.append(decoder.advance(tokens[:, start:stop]))
        torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-3, atol=1e-3)
        start, state = data.draw(st.sampled_from(states))
        decoder.restore(rows(state, chosen))
        torch.testing.assert_close(decoder.advance(tokens[chosen, start:]), whole[chosen, start:], rtol=1e-3, atol=1e-3)
        start, state = states[0]
        decoder.restore(join([rows(at, [row]) for row, (_, at) in enumerate(states[:3])]))
        if any(at == 12 for at, _ in states[:3]):
            return
        columns = torch.stack([tokens[row, at] for row, (at, _) in enumerate(states[:3])])[:, None]
        expected = torch.stack([whole[row, at] for row, (at, _) in enumerate(states[:3])])[:, None]
        torch.testing.assert_close(decoder.advance(columns), expected, rtol=1e-3, atol=1e-3)


@compiled
@torch.no_grad()
def test_preparing_and_stepping_leave_the_given_state_alone() -> None:
    model = make_model(MODELS["conv"])
    one = torch.ones(2, 1, dtype=torch.long)
    state = model(torch.ones(2, 10, dtype=torch.long)).state
    before = [x.clone() for x in tensors(state)]
    decoder = PreparedDecoder(model, state)
    after_one = decoder.advance(one)
    kept = decoder.state()
    kept_values = [x.clone() for x in tensors(kept)]
    decoder.advance(one)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors(state), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(kept_values, tensors(kept), strict=True))
    assert torch.equal(PreparedDecoder(model, state).advance(one), after_one)
    torch.testing.assert_close(PreparedDecoder(model, kept).advance(one), model(one, kept).logits)


def test_what_cannot_be_prepared_runs_as_it_is() -> None:
    dense = make_model({"base_kernel": {"kind": "dense", "size": 20}})
    double = make_model(MODELS["conv"]).double()
    for model in (dense, double):
        assert not can_prepare(model)
        assert isinstance(open_decoder(model, model.initial_state(1)), EagerDecoder)
        assert model.generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=5, seed=0).shape == (1, 8)
        with pytest.raises(InputError, match=r"^a prepared decoder cannot take this model: .*; use EagerDecoder$"):
            PreparedDecoder(model, model.initial_state(1))


def parts_of(kind: str) -> list[str]:
    containers = (nn.ModuleList, nn.ModuleDict, nn.ParameterList)
    return [n for n, part in make_model(MODELS[kind]).named_modules() if n and not isinstance(part, containers)]


CHANGED = (
    "no kernel, factorised",
    "refined",
    "gated",
    "gelu head",
    "copies, factorised, gated",
    "fast weights",
    "nanochat",
    "all of them, copies, gelu head",
)
PARTS = [(kind, part) for kind in CHANGED for part in parts_of(kind)]
PARTS += [("copies, refined, gelu head", part) for part in ("pointer", "copy_memory", "copy_memory.from_table")]


@pytest.mark.parametrize(("kind", "part"), PARTS)
@torch.no_grad()
def test_a_model_with_an_unknown_part_is_not_prepared_and_its_text_is_that_of_its_modules(kind: str, part: str) -> None:
    model, tokens = make_model(MODELS[kind]), make_tokens(2, 9)
    before = model(tokens).logits
    change(model.get_submodule(part))
    assert not can_prepare(model)
    assert part in str(why_not_prepared(model)) or part == "stack"
    after = model(tokens).logits
    assert before is not None
    assert after is not None
    assert not torch.allclose(before, after, rtol=1e-6, atol=1e-7), "the changed part is never called"
    decoder = open_decoder(model, model.initial_state(2))
    pieces = [decoder.advance(tokens[:, t : t + 1]) for t in range(9)]
    torch.testing.assert_close(torch.cat(pieces, 1), after, rtol=1e-3, atol=1e-4)


class TanhNorm(nn.Module):
    """The norm of the fault's reproduction: prepared decoding took its weight for that of an RMSNorm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x) * self.weight


def test_every_way_to_change_a_part_is_seen() -> None:
    def replaced(model: Any) -> None:
        model.stack.blocks[0].mixing_norm = TanhNorm(20)

    def hooked(model: Any) -> None:
        model.stack.last.feed_forward.up.register_forward_hook(lambda module, given, answer: answer * 2)

    def parametrised(model: Any) -> None:
        nn.utils.parametrizations.weight_norm(model.stack.first.mixer.projection)

    def other_forward(model: Any) -> None:
        model.head.forward = lambda hidden, embedding: hidden @ embedding.T * 2

    def one_more(model: Any) -> None:
        model.stack.first.adapter = nn.Linear(20, 20)

    def in_training(model: Any) -> None:
        model.train()

    for way in (replaced, hooked, parametrised, other_forward, one_more, in_training):
        model = make_model(MODELS["conv"])
        way(model)
        assert not can_prepare(model), way.__name__


@pytest.mark.parametrize("token", [1 << 40, -1, VOCABULARY, -(1 << 63)])
def test_tokens_outside_the_vocabulary_are_named_and_change_nothing(token: int) -> None:
    model = make_model(MODELS["conv"])
    for make in decoders("conv"):
        decoder = make(model, model.initial_state(2))
        before = tensors(decoder.state())
        for t in (1, 3):
            tokens = torch.zeros(2, t, dtype=torch.long)
            tokens[1, -1] = token
            with pytest.raises(InputError, match=rf"^tokens: got {token}; allowed: 0 to 36, this model's vocabulary$"):
                decoder.advance(tokens)
            with pytest.raises(InputError, match=rf"^tokens: got {token}; allowed: 0 to 36, this model's vocabulary$"):
                decoder.step(tokens[:, -1])
        assert all(torch.equal(a, b) for a, b in zip(before, tensors(decoder.state()), strict=True))


@compiled
def test_tokens_of_another_shape_or_dtype_are_named() -> None:
    model = make_model(MODELS["conv"])
    decoder = PreparedDecoder(model, model.initial_state(2))
    for tokens in (torch.zeros(3, 1).long(), torch.zeros(2).long(), torch.zeros(2, 1), torch.zeros(2, 1).int()):
        with pytest.raises(InputError, match=r"^tokens: got .*; allowed: .*$"):
            decoder.advance(tokens)
        with pytest.raises(
            InputError, match=r"^tokens: got .*; allowed: torch.int64, one .* each of the 2 rows of this"
        ):
            decoder.step(tokens[:, 0] if tokens.ndim == 2 and tokens.dtype != torch.int64 else tokens.reshape(-1, 1))


def test_states_of_another_model_are_named() -> None:
    model = make_model(MODELS["conv"])
    good = model.initial_state(2)
    others = [
        None,
        torch.zeros(2, 3, 20),
        make_model({**MODELS["conv"], "rank": 4}).initial_state(2),
        make_model(MODELS["conv"], width=24).initial_state(2),
        make_model(MODELS["refined"]).initial_state(2),
        make_model(MODELS["no kernel, factorised"]).initial_state(2),
        map_tensors(lambda tensor: tensor.double(), good),
        map_tensors(lambda tensor: tensor.long(), good),
        map_tensors(lambda tensor: tensor[..., :-1], good),
        map_tensors(lambda tensor: tensor.flatten(1), good),
        map_tensors(lambda tensor: tensor[: 1 + (tensor.shape[1] == 3)], good),  # other rows of decays than of inputs
    ]
    for make in decoders("conv"):
        decoder = make(model, good)
        for state in others:
            for take in (decoder.restore, lambda state, make=make: make(model, state)):
                with pytest.raises(
                    InputError, match=r"^state: got .*; allowed there: .*; give what this model returned"
                ):
                    take(state)
        decoder.advance(torch.zeros(2, 1, dtype=torch.long))  # and goes on from where it stood


@compiled
@torch.no_grad()
def test_a_chunk_that_is_shorter_than_its_position_is_named() -> None:
    model = make_model(MODELS["fast weights"])
    decoder, state = PreparedDecoder(model, model.initial_state(2)), model(make_tokens(2, 7)).state
    block = state[0][2]
    fast = block.feed_forward
    for part in ("hidden", "targets"):
        other = block._replace(feed_forward=fast._replace(**{part: getattr(fast, part)[:, :2]}))
        with pytest.raises(
            InputError, match=r"^state: got . and . positions of an unfinished chunk; allowed there: equ"
        ):
            decoder.restore(((*state[0][:2], other, *state[0][3:]),))
    decoder.advance(make_tokens(2, 1))


@compiled
@torch.no_grad()
def test_weights_that_do_not_fit_each_other_are_refused_before_anything_runs() -> None:
    model = make_model(MODELS["conv"])
    model.stack.last = copy.deepcopy(make_model(MODELS["conv"], width=24).stack.last)
    with pytest.raises(InputError, match="the weights of this model do not fit each other"):
        PreparedDecoder(model, model.initial_state(1))
