"""How likely continuations are: what the model's own logits say, whatever else was asked before."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kmixer.data.token_cache import Counts, TokenSplit
from kmixer.data.tokenizers import Tokens
from kmixer.errors import InputError
from kmixer.interop import continuations
from kmixer.interop.continuations import ContextStates, Likelihood, document_nats
from kmixer.language_model import LanguageModel
from kmixer.measure.evaluation import evaluate
from kmixer.models import ModelConfig
from kmixer.models.transformer import TransformerConfig

VOCABULARY = 23
FAST = {"layers": [1], "chunk": 4}
BLOCK_OF_K2 = {"kind": "transformer", "width": 16, "layers": 2, "heads": 2}
MODELS: dict[str, dict[str, Any]] = {
    "conv": {},
    "copies": {"copy_memory": {"memory": 8, "match_length": "both", "pointer": True}},
    "fast weights": {"fast_weights": FAST},
    "softmax": {**BLOCK_OF_K2, "mixers": ["softmax"]},
    "ends": {"base_kernel": {"kind": "dense", "size": 20}},
}
STREAMING = [name for name in MODELS if name != "ends"]


def make_model(name: str, dtype: torch.dtype = torch.float64) -> LanguageModel:
    torch.manual_seed(0)
    values = MODELS[name]
    if values.get("kind") == "transformer":
        model = LanguageModel(TransformerConfig.parse(values, source="test"), VOCABULARY)
    else:
        config = ModelConfig.parse({"width": 16, "layers": 2, "rank": 3, **values}, source="test")
        model = LanguageModel(config, VOCABULARY)
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.to(dtype).eval()


def tokens_of(count: int, seed: int = 0) -> Tokens:
    """Of a few tokens, so that they repeat."""
    return np.random.default_rng(seed).integers(0, 5, count) * 4


@torch.no_grad()
def by_the_model(model: LanguageModel, context: Tokens, continuation: Tokens) -> Likelihood:
    """From the logits of one call over all."""
    logits = model(torch.from_numpy(np.concatenate([context, continuation[:-1]]))[None]).logits
    assert logits is not None
    rows = logits[0, len(context) - 1 :].double().log_softmax(-1)
    chosen = torch.from_numpy(continuation)
    return Likelihood(float(rows.gather(1, chosen[:, None]).sum()), bool((rows.argmax(-1) == chosen).all()))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("context", "continuation"), [(1, 6), (7, 1), (13, 7)])
def test_a_likelihood_is_that_of_the_models_logits(
    name: str, context: int, continuation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(continuations, "BLOCK", 5)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        model = make_model(name, dtype)
        before, after = tokens_of(context), tokens_of(continuation, 1)
        found, expected = ContextStates(model).likelihood(before, after), by_the_model(model, before, after)
        assert found.log_probability == pytest.approx(expected.log_probability, abs=tolerance)
        assert found.is_greedy == expected.is_greedy


@pytest.mark.parametrize("name", MODELS)
def test_the_likeliest_continuation_is_greedy(name: str) -> None:
    model, context = make_model(name), tokens_of(9)
    whole = torch.from_numpy(context)[None]
    greedy = model.generate(whole, 4, temperature=0.0)[0, 9:].numpy()
    states = ContextStates(model)
    assert states.likelihood(context, greedy).is_greedy
    assert not states.likelihood(context, (greedy + 1) % VOCABULARY).is_greedy
    assert states.likelihood(context, greedy[:0]) == (0.0, True)


@given(
    asked=st.lists(st.tuples(st.integers(1, 14), st.integers(0, 1), st.integers(1, 3)), min_size=1, max_size=8),
    kept_bytes=st.sampled_from([1, 4000, 1 << 20]),
    name=st.sampled_from(list(MODELS)),
)
@settings(max_examples=10)
def test_a_likelihood_does_not_depend_on_what_else_was_asked(
    asked: list[tuple[int, int, int]], kept_bytes: int, name: str
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(continuations, "BLOCK", 4)
        model = make_model(name, torch.float32)
        together = ContextStates(model, kept_bytes)
        for length, last, continuation in asked:
            context = np.append(tokens_of(length), last)
            after = tokens_of(continuation, last)
            assert together.likelihood(context, after) == ContextStates(model).likelihood(context, after)


def test_a_context_is_read_once_and_what_contexts_share_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(continuations, "BLOCK", 8)
    states, context = ContextStates(make_model("conv")), tokens_of(20)
    for continuation in ([1], [2], [3, 4, 5]):
        states.likelihood(context, np.array(continuation))
    assert states.tokens_read == 20 + 2
    states.likelihood(np.append(context[:17], [7, 7, 7]), np.array([1]))
    assert states.tokens_read == 22 + 4  # from the second block's end


def test_a_model_that_ends_reads_the_last_of_a_long_context() -> None:
    model, states = make_model("ends"), ContextStates(make_model("ends"))
    context, continuation = tokens_of(50), tokens_of(4, 1)
    found = states.likelihood(context, continuation)
    assert found == pytest.approx(by_the_model(model, context[-17:], continuation))
    assert states.contexts_cut == 1
    assert states.likelihood(context[:17], continuation) and states.contexts_cut == 1
    with pytest.raises(InputError, match=r"21 tokens.*ends at position 20"):
        states.likelihood(context, tokens_of(21))


def test_an_empty_context_or_prefix_is_refused() -> None:
    model, nothing = make_model("conv"), tokens_of(0)
    with pytest.raises(InputError, match="give one or more"):
        ContextStates(model).likelihood(nothing, tokens_of(3))
    with pytest.raises(InputError, match="give one or more"):
        document_nats(model, nothing, tokens_of(3))
    assert document_nats(model, tokens_of(1), nothing) == 0.0


@pytest.mark.parametrize("name", STREAMING)
@pytest.mark.parametrize("prefix", [1, 3])
def test_a_document_is_one_stream_after_its_prefix(name: str, prefix: int) -> None:
    model = make_model(name)
    before, document = tokens_of(prefix, 1), tokens_of(57)
    whole = np.concatenate([before, document])
    found = document_nats(model, before, document)
    assert found == pytest.approx(-by_the_model(model, before, document).log_probability, abs=1e-9)
    if prefix == 1:
        split = TokenSplit(torch.from_numpy(whole), Counts(tokens=58, characters=58, bytes=58, words=1))
        measured = evaluate(model, split, "stream", 8)
        assert found == pytest.approx(measured.loss * measured.tokens, abs=1e-9)


@pytest.mark.parametrize("length", [1, 19, 20, 21, 40, 47])
def test_a_model_that_ends_reads_a_document_in_windows(length: int) -> None:
    """Of its 20 positions: every token once, the last window with all the context that fits."""
    model, before, document = make_model("ends"), tokens_of(1, 1), tokens_of(length)
    whole = np.concatenate([before, document])
    expected = 0.0
    for begin in range(1, length + 1, 20):
        end = min(begin + 20, length + 1)
        first = max(0, end - 21)
        expected -= by_the_model(model, whole[first:begin], whole[begin:end]).log_probability
    assert document_nats(model, before, document) == pytest.approx(expected, abs=1e-9)
