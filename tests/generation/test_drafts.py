"""Drafts: they propose from where the text stands, whatever was kept of what they proposed before."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import kmixer
from kmixer import native
from kmixer.data.tokenizers import ByteTokenizer, CharTokenizer
from kmixer.errors import InputError
from kmixer.generation.drafts import Draft, LookupDraft, ModelDraft, NgramDraft, check_same_tokens
from kmixer.generation.draws import FreshDraws, open_draws
from kmixer.generation.ngrams import count_ngrams
from kmixer.generation.rules import Exact
from kmixer.generation.sampling import Sampling
from kmixer.generation.speculation import Speculation
from kmixer.models import ModelConfig

V = 11
NGRAMS = count_ngrams(np.random.default_rng(0).integers(0, V, 400), V, 4)


def make_model(dtype: torch.dtype = torch.float64, **values: Any) -> kmixer.LanguageModel:
    torch.manual_seed(0)
    config = {"width": 8, "layers": 2, "rank": 2, "base_kernel": {"kind": "conv", "size": 3}, **values}
    model = kmixer.LanguageModel(ModelConfig.parse(config, source="test"), V).eval()
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.5)
    return model.to(dtype)


def make_draft(kind: str) -> Draft:
    if kind == "ngram":
        return NgramDraft(NGRAMS)
    if kind == "lookup":
        return LookupDraft(3, 1, lockstep=False)
    return ModelDraft(make_model(torch.float32 if kind == "prepared" else torch.float64))


def proposal(draft: Draft, count: int) -> tuple[Tensor, Tensor | None]:
    return draft.propose(count, FreshDraws(Exact(), Sampling(0.8), torch.Generator().manual_seed(3)).draft)


@pytest.mark.parametrize(
    "kind",
    [
        "ngram",
        "lookup",
        "model",
        pytest.param(
            "prepared", marks=pytest.mark.skipif(native.kernels() is None, reason="the compiled kernels were not built")
        ),
    ],
)
@given(st.data())
@settings(max_examples=20)
def test_a_draft_stands_where_the_text_stands(kind: str, data: st.DataObject) -> None:
    """After rounds of which any tokens were kept, rows with others too, as after the text as a prompt."""
    rows = data.draw(st.integers(1, 3))
    prompt = torch.tensor(
        data.draw(st.lists(st.lists(st.integers(0, V - 1), min_size=5, max_size=5), min_size=rows, max_size=rows))
    )
    draft = make_draft(kind)
    draft.start(prompt)
    texts = prompt.tolist()
    for _ in range(data.draw(st.integers(1, 4))):
        tokens, p = proposal(draft, data.draw(st.integers(0, 4)))
        m = tokens.shape[1]
        assert p is None or p.shape == (rows, m, V)
        kept = [data.draw(st.integers(0, m)) for _ in range(rows)]
        if data.draw(st.booleans()):
            kept = [kept[0]] * rows
        last = [data.draw(st.integers(0, V - 1)) for _ in range(rows)]
        draft.commit(torch.tensor(kept), torch.tensor(last))
        texts = [t + new[:k] + [x] for t, new, k, x in zip(texts, tokens.tolist(), kept, last, strict=True)]
    tokens, p = proposal(draft, 3)
    for row, text in enumerate(texts):  # rows have other lengths now
        fresh = make_draft(kind)
        fresh.start(torch.tensor([text]))
        expected, q = proposal(fresh, 3)
        if p is None or q is None:
            assert p is q
            if expected.shape[1]:
                assert tokens[row].tolist() == expected[0].tolist()
        else:
            tolerance = 1e-5 if kind == "prepared" else 1e-12
            torch.testing.assert_close(p[row, 0], q[0, 0], rtol=0, atol=tolerance)


@given(st.integers(0, 1000), st.integers(1, 5))
@settings(max_examples=20)
def test_rows_are_those_of_the_model_after_what_was_drafted(seed: int, count: int) -> None:
    model, sampling = make_model(), Sampling(0.7, top_k=6)
    prompt = torch.randint(V, (2, 6), generator=torch.Generator().manual_seed(seed))
    draws = open_draws(Speculation("exact"), sampling, torch.Generator().manual_seed(seed))
    draft = ModelDraft(model)
    draft.start(prompt)
    tokens, p = draft.propose(count, draws.draft)
    with torch.no_grad():
        logits = model(torch.cat([prompt, tokens], 1)).logits[:, 5:-1]
    assert p is not None
    torch.testing.assert_close(p, sampling.rows(logits), rtol=0, atol=1e-12)
    assert bool((p.gather(-1, tokens[..., None]) > 0).all())


def looked_up(text: list[int], largest: int, smallest: int, count: int) -> list[int]:
    """By the definition, with a scan: the text goes on as after the latest place that has its longest known end."""
    for size in range(largest, smallest - 1, -1):
        for end in range(len(text) - 1, size - 1, -1):
            if size <= len(text) and text[end - size : end] == text[len(text) - size :]:
                whole = list(text)
                for i in range(count):
                    whole.append(whole[end + i])
                return whole[len(text) :]
    return []


@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=30),
    st.integers(1, 2),
    st.integers(0, 3),
    st.integers(1, 6),
)
def test_look_up_is_a_scan_for_the_latest_match(text: list[int], smallest: int, more: int, count: int) -> None:
    draft = LookupDraft(smallest + more, smallest)
    draft.start(torch.tensor([text[:1]]))
    for token in text[1:]:
        assert proposal(draft, 0)[0].shape == (1, 0)
        draft.commit(torch.tensor([0]), torch.tensor([token]))
    tokens, rows = proposal(draft, count)
    assert rows is None
    assert tokens[0].tolist() == looked_up(text, smallest + more, smallest, count)


def test_look_up_in_lockstep_waits_for_all_rows() -> None:
    prompt = torch.tensor([[1, 2, 3, 1, 2], [1, 2, 3, 4, 5]])
    together, alone = LookupDraft(), LookupDraft(lockstep=False)
    for draft in (together, alone):
        draft.start(prompt)
    assert proposal(together, 3)[0].shape == (2, 0)
    assert proposal(alone, 3)[0].tolist()[0] == [3, 1, 2]
    with pytest.raises(InputError, match="min_match, max_match: got 3, 2; allowed: 1 <= min_match <= max_match"):
        LookupDraft(2, 3)


def test_models_that_cannot_draft_are_named() -> None:
    with pytest.raises(InputError, match=r"^draft: got a model in training mode; call draft\.eval\(\) first$"):
        ModelDraft(make_model().train())
    ends = make_model(base_kernel={"kind": "dense", "size": 20})
    with pytest.raises(
        InputError, match=r"^draft: the dense base kernel ends at 20 positions; give a draft that streams"
    ):
        ModelDraft(ends)


def test_other_tokens_are_refused() -> None:
    abc, abd, raw = (t.to_json() for t in (CharTokenizer("abc"), CharTokenizer("abd"), ByteTokenizer()))
    check_same_tokens(abc, 3, dict(abc), 3)
    check_same_tokens(None, 3, abc, 3)
    for theirs, size, shown in ((abd, 3, "char, 3 tokens"), (raw, 256, "byte, 256 tokens"), (None, 4, "4 tokens")):
        with pytest.raises(InputError) as raised:
            check_same_tokens(abc, 3, theirs, size)
        assert str(raised.value) == (
            f"draft: it has other tokens ({shown}) than the model (char, 3 tokens); "
            "give a draft made with the model's tokenizer"
        )
