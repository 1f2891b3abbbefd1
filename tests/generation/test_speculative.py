"""Speculative decoding: the text of plain generation, or its law, whatever drafts and whatever was kept."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kmixer.generation import Sampling, Speculation, generate_tokens
from kmixer.generation.cut_short import first_layers
from kmixer.generation.drafts import Draft, LookupDraft, ModelDraft, NgramDraft
from kmixer.generation.ngrams import count_ngrams
from kmixer.generation.speculative import Rounds
from kmixer.models import CausalLM, ModelConfig, TransformerConfig
from kmixer.models.mixers.registry import CARDS

V = 7
NGRAMS = count_ngrams(np.random.default_rng(0).integers(0, V, 300), V, 3)
STACK = {"width": 8, "layers": 2, "rank": 2, "base_kernel": {"kind": "conv", "size": 3}}
BLOCKS = {"width": 8, "layers": 2, "heads": 2, "kind": "transformer"}
MODELS: dict[str, dict[str, Any]] = {
    "conv": STACK,
    "toeplitz": {**STACK, "base_kernel": {"kind": "toeplitz", "size": 6}},
    "dense": {**STACK, "base_kernel": {"kind": "dense", "size": 40}},
    "low rank": {**STACK, "base_kernel": {"kind": "low_rank", "size": 40, "rank": 2}},
    "no base kernel": {**STACK, "base_kernel": {"kind": "none"}},
    "shared base kernel": {**STACK, "base_kernel": {"kind": "conv", "size": 3, "shared": True}},
    "refined": {**STACK, "refinement": {"steps": 3}},
    "refined, dense": {**STACK, "refinement": {"steps": 2}, "base_kernel": {"kind": "dense", "size": 40}},
    "copies": {**STACK, "copy_memory": {"match_length": "both", "memory": 8, "pointer": True, "second": 2}},
    "copies, refined": {**STACK, "refinement": {"steps": 2}, "copy_memory": {"layers": "last", "memory": 16}},
    **{name: {**BLOCKS, "mixers": name} for name in CARDS},
    **{
        f"{name}, window": {**BLOCKS, "mixers": name, "windows": "SL", "window": 4}
        for name, card in CARDS.items()
        if card.has_window
    },
    **{
        f"{name}, copies": {**BLOCKS, "mixers": name, "copy_memory": {"match_length": "gate", "memory": 10}}
        for name in CARDS
    },
    "nanochat blocks": {**BLOCKS, "layers": 3, "blocks": "nanochat", "value_embeddings": True},
}
DRAFTS = ("ngram", "lookup", "model", "itself", "layers", "random")


def parse(values: dict[str, Any]) -> ModelConfig | TransformerConfig:
    return (TransformerConfig if "kind" in values else ModelConfig).parse(values, source="test")


def make(values: dict[str, Any], seed: int = 0) -> CausalLM:
    torch.manual_seed(seed)
    model = CausalLM(parse(values), V).double().eval()
    for parameter in model.parameters():  # away from the near-zero start, so that every path matters
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.4)
    return model


class RandomDraft:
    """Tokens that nothing justifies, now and then fewer than asked for."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def start(self, prompt: Tensor) -> None:
        self._rows = len(prompt)

    def propose(self, count: int, draw: object) -> tuple[Tensor, None]:
        count = int(torch.randint(count + 1, (), generator=self._generator))
        return torch.randint(V, (self._rows, count), generator=self._generator), None

    def commit(self, kept: Tensor, last: Tensor) -> None:
        pass


def make_draft(kind: str, model: CausalLM, *, lockstep: bool, seed: int = 0) -> Draft:
    ends = model.config.max_positions is not None
    if kind == "ngram" or (ends and kind in ("itself", "layers")):
        return NgramDraft(NGRAMS)
    if kind == "lookup":
        return LookupDraft(3, 1, lockstep=lockstep)
    if kind == "random":
        return RandomDraft(seed)
    if kind == "model":
        return ModelDraft(make(STACK, seed=1))
    return ModelDraft(model if kind == "itself" else first_layers(model, 1))


def plain(model: CausalLM, prompt: Tensor, count: int, sampling: Sampling, seed: int) -> Tensor:
    return torch.stack(list(generate_tokens(model, prompt, count, sampling, seed=seed)), 1)


samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.7, 1.0, 1.5]),
    top_k=st.sampled_from([None, 3]),
    top_p=st.sampled_from([None, 0.8]),
)


@pytest.mark.parametrize("kind", MODELS)
@given(data=st.data(), sampling=samplings, seed=st.integers(0, 1000))
@settings(max_examples=5)
def test_coupled_text_is_that_of_plain_generation(
    kind: str, data: st.DataObject, sampling: Sampling, seed: int
) -> None:
    """For every seed, draft, number of drafted tokens and batch; rows advance together or by themselves."""
    model = make(MODELS[kind])
    ends = model.config.max_positions is not None
    rows, m = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 6))
    pace = "lockstep" if ends else data.draw(st.sampled_from(["lockstep", "own"]))
    prompt = torch.randint(V, (rows, data.draw(st.integers(1, 8))), generator=torch.Generator().manual_seed(seed))
    draft = make_draft(data.draw(st.sampled_from(DRAFTS)), model, lockstep=pace == "lockstep", seed=seed)
    count = data.draw(st.integers(1, 12))
    rounds = Rounds(model, draft, prompt, count, Speculation("coupled", m, pace=pace), sampling, seed=seed)
    new = torch.stack(list(rounds.columns()), 1)
    assert torch.equal(new, plain(model, prompt, count, sampling, seed))


@pytest.mark.parametrize("kind", MODELS)
@given(data=st.data(), seed=st.integers(0, 1000))
@settings(max_examples=2)
def test_the_state_after_rounds_is_that_of_reading(kind: str, data: st.DataObject, seed: int) -> None:
    model = make(MODELS[kind])
    rule = data.draw(st.sampled_from(["coupled", "exact", "typical"]))
    prompt = torch.randint(V, (2, 5), generator=torch.Generator().manual_seed(seed))
    draft = make_draft(data.draw(st.sampled_from(DRAFTS)), model, lockstep=True, seed=seed)
    rounds = Rounds(model, draft, prompt, 30, Speculation(rule, 3), seed=seed)
    new, columns = [], rounds.columns()
    while len(new) < 6 or any(rounds._ready):
        new.append(next(columns))
    with torch.no_grad():
        expected = model(torch.cat([prompt, torch.stack(new[:-1], 1)], 1)).state
    torch.testing.assert_close(rounds.state(), expected, rtol=1e-9, atol=1e-12)
