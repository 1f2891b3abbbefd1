"""Speculative decoding: the text of plain generation, or its law, whatever drafts and whatever was kept."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import kmixer
from kmixer import native
from kmixer.data.tokenizers import ByteTokenizer
from kmixer.errors import InputError
from kmixer.generation import Sampling, Speculation, generate_tokens, speculate
from kmixer.generation.chunks import ReadAgain, open_reader
from kmixer.generation.cut_short import fewer_passes, first_layers
from kmixer.generation.decoder import EagerDecoder
from kmixer.generation.drafts import Draft, LookupDraft, ModelDraft, NgramDraft
from kmixer.generation.ngrams import count_ngrams
from kmixer.generation.prepared import can_prepare
from kmixer.generation.speculation import RULES
from kmixer.generation.speculative import Rounds
from kmixer.models import CausalLM, ModelConfig, TransformerConfig
from kmixer.models.mixers.registry import CARDS, CAUSAL_NAMES

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
    **{name: {**BLOCKS, "mixers": name} for name in CAUSAL_NAMES},
    **{
        f"{name}, window": {**BLOCKS, "mixers": name, "windows": "SL", "window": 4}
        for name, card in CARDS.items()
        if card.has_window
    },
    **{
        f"{name}, copies": {**BLOCKS, "mixers": name, "copy_memory": {"match_length": "gate", "memory": 10}}
        for name in CAUSAL_NAMES
    },
    # Chunks shorter than a round: their borders lie inside it.
    "fast weights": {**STACK, "fast_weights": {"chunk": 3, "layers": "every", "max_norm": 1.0}},
    "fast weights, copies": {**STACK, "copy_memory": {"memory": 8}, "fast_weights": {"chunk": 4, "reset_every": 6}},
    "fast weights by token, softmax": {**BLOCKS, "fast_weights": {"chunk": 1}},
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


@pytest.mark.skipif(native.kernels() is None, reason="the compiled kernels were not built")
@pytest.mark.parametrize("pace", ["lockstep", "own"])
@pytest.mark.parametrize(
    "section",
    [{"chunk": 3, "layers": "every", "max_norm": 1.0}, {"chunk": 4, "reset_every": 6}, {"chunk": 5, "tau": None}],
    ids=str,
)
def test_coupled_text_of_prepared_fast_weights_is_that_of_plain_generation(section: dict[str, Any], pace: Any) -> None:
    """Rounds cross the ends of chunks, and what is refused leaves no trace in what was learned."""
    model = make({**STACK, "base_kernel": {"kind": "conv", "size": 3}, "fast_weights": section}).float()
    assert can_prepare(model)
    for m in (1, 4, 7):
        prompt = torch.randint(V, (3, m + 1), generator=torch.Generator().manual_seed(m))
        for kind in ("ngram", "random"):
            draft = make_draft(kind, model, lockstep=pace == "lockstep", seed=m)
            rounds = Rounds(model, draft, prompt, 40, Speculation("coupled", m, pace=pace), Sampling(), seed=m)
            new = torch.stack(list(rounds.columns()), 1)
            assert torch.equal(new, plain(model, prompt, 40, Sampling(), m))


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


@pytest.mark.parametrize("rule", ["coupled", "exact", "block"])
def test_a_draft_that_is_the_model_is_kept_whole(rule: Any) -> None:
    model, prompt = make(MODELS["copies"]), torch.tensor([[1, 2, 3]])
    for m in (1, 3, 5):
        result = speculate(model, model, prompt, 4 * (m + 1), Speculation(rule, m), seed=m)
        assert (result.rounds, result.kept, result.refused) == (4, 4 * m, 0)
        assert result.kept_by_position == (4,) * m
        assert result.mean_emitted == m + 1 and result.acceptance == 1


@pytest.mark.parametrize("rule", RULES)
def test_greedy_text_is_that_of_plain_generation(rule: Any) -> None:
    """By every rule, also where all tokens are equally likely: the first is taken."""
    settings: dict[str, Any] = {"cactus": {"delta": 1.0}, "bounded": {"bound": 0.5}, "interp": {"mix": 0.5}}
    speculation, greedy = Speculation(rule, 4, **settings.get(rule, {})), Sampling(0.0)
    prompt = torch.tensor([[1, 2, 3]] if rule == "block" else [[1, 2, 3], [3, 0, 6]])
    model = make(STACK)
    for draft in ("ngram", "model"):
        drafts = make_draft(draft, model, lockstep=True)
        result = speculate(model, drafts, prompt, 15, speculation, greedy)
        assert torch.equal(result.tokens[:, 3:], plain(model, prompt, 15, greedy, 0))
        assert result.spent_max in (0, None)
    with torch.no_grad():
        model.embedding.weight.zero_()
    result = speculate(model, make_draft("model", model, lockstep=True), prompt, 9, speculation, greedy)
    assert not result.tokens[:, 3:].any()


def test_rows_in_lockstep_have_the_law_of_each_alone() -> None:
    """Chi-square of the first two tokens of rows with other prompts, rule "exact"."""
    torch.manual_seed(0)
    model = CausalLM(parse({**STACK, "layers": 1}), 2).double().eval()
    other = CausalLM(parse({**STACK, "layers": 1}), 2).double().eval()
    for parameter in (*model.parameters(), *other.parameters()):
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.5)
    prompt, count = torch.tensor([[0, 1], [1, 1]]), 150
    observed = torch.zeros(2, 4)
    for seed in range(count):
        first, second = speculate(model, other, prompt, 2, Speculation("exact", 1), seed=seed).tokens[:, 2:].T
        observed[torch.arange(2), 2 * first + second] += 1
    for row in range(2):
        with torch.no_grad():
            text = torch.cat([prompt[[row] * 2], torch.arange(2)[:, None]], 1)
            q = torch.softmax(model(text).logits, -1)
        expected = (q[0, 1, :, None] * q[:, 2]).flatten() * count
        assert float(((observed[row] - expected) ** 2 / expected).sum()) < 16.3  # 3 degrees of freedom, p = .001


@given(st.integers(0, 1000), st.integers(0, 12), st.integers(1, 6), st.sampled_from(["lookup", "self:1"]))
@settings(max_examples=4)
def test_texts_end_where_plain_ones_do_and_come_in_the_same_pieces(seed: int, count: int, m: int, draft: str) -> None:
    torch.manual_seed(0)
    model = kmixer.LanguageModel(parse(STACK), 256, ByteTokenizer()).double()
    options: dict[str, Any] = {"max_new_tokens": count, "seed": seed, "top_k": 4}
    drafted: dict[str, Any] = {**options, "draft": draft, "speculation": Speculation(tokens=m)}
    whole = model.generate("éa: ", **options)
    assert model.generate("éa: ", **drafted) == whole
    pieces = list(model.generate("éa: ", stream=True, **options))
    assert list(model.generate("éa: ", stream=True, **drafted)) == pieces
    stop = [whole[-3:], whole[6:8]]
    text = model.generate("éa: ", stop=stop, **options)
    assert model.generate("éa: ", stop=stop, **drafted) == text
    model.eval()
    assert (
        speculate(model, draft, "éa: ", count, Speculation(tokens=m), Sampling(top_k=4), seed, stop=stop).text == text
    )
    model.train()
    model.generate("éa: ", **drafted)
    assert model.training


@pytest.mark.skipif(native.kernels() is None, reason="the compiled kernels were not built")
@pytest.mark.parametrize("kind", ["conv", "refined", "copies"])
def test_the_prepared_step_gives_the_plain_text_too(kind: str) -> None:
    """In float32 chunks and steps differ by rounding; of these seeds none is decided by it."""
    values = MODELS[kind] | ({"copy_memory": {"match_length": "gate", "memory": 8}} if kind == "copies" else {})
    model, sampling = make(values).float(), Sampling(0.8)
    assert can_prepare(model)
    prompt = torch.tensor([[1, 2, 3], [4, 4, 1]])
    for seed in range(4):
        for pace in ("lockstep", "own"):
            draft = make_draft("layers", model, lockstep=True)
            result = speculate(model, draft, prompt.int(), 25, Speculation(tokens=3, pace=pace), sampling, seed)
            assert torch.equal(result.tokens[:, 3:], plain(model, prompt, 25, sampling, seed))


def test_what_is_counted_is_what_happened() -> None:
    model, prompt = make(STACK), torch.tensor([[1, 2, 3]])
    draft = make(STACK, seed=1)
    results = {}
    for rule, options in {"exact": {}, "cactus": {"delta": 0.2}, "bounded": {"bound": 0.05}, "typical": {}}.items():
        settings = Speculation(rule, 4, measure="law", **options)  # type: ignore[arg-type]
        result = results[rule] = speculate(model, draft, prompt, 30, settings, Sampling(0.9, top_k=5), seed=2)
        assert sum(result.kept_by_position) == result.kept and result.kept + result.refused <= result.drafted
        assert result.kept + result.rounds == result.tokens.shape[1] - 3 == 30
        with torch.no_grad():
            losses = model(result.tokens[:, :-1], targets=result.tokens[:, 1:]).losses
        assert result.verifier_nll == pytest.approx(float(losses[0, 2:].mean()), abs=1e-9)
        assert "tokens" not in json.loads(json.dumps(result.to_json()))
    assert results["exact"].spent_max == 0 and results["exact"].output_divergence_max == pytest.approx(0, abs=1e-9)
    assert 0 < results["cactus"].spent_mean <= results["cactus"].spent_max
    assert results["bounded"].spent_mean is None and 0 < results["bounded"].output_divergence_max <= 0.05 + 1e-9


@given(st.lists(st.integers(0, V - 1), min_size=4, max_size=4), st.lists(st.integers(0, 4), min_size=2, max_size=2))
@settings(max_examples=10)
def test_a_read_does_not_move_and_its_beginning_is_kept(tokens: list[int], lengths: list[int]) -> None:
    model = make(MODELS["copies"])
    chunk = torch.tensor([tokens, tokens[::-1]])
    with torch.no_grad():
        state = model(chunk).state
        for reader in (ReadAgain(EagerDecoder(model, state)), open_reader(model, state)):
            reader.read(chunk.flip(1))
            torch.testing.assert_close(reader.read(chunk), model(chunk, state).logits)
            torch.testing.assert_close(reader.state(), state, rtol=0, atol=0)
            reader.commit(torch.tensor(lengths))
            following = reader.step(torch.tensor([1, 2]))
            for row, length in enumerate(lengths):
                text = torch.cat([chunk[row], chunk[row, :length], torch.tensor([row + 1])])
                torch.testing.assert_close(following[row], model(text[None]).logits[0, -1])
    assert isinstance(open_reader(model, state), EagerDecoder)


def test_a_mixer_without_a_trail_is_read_again() -> None:
    class Foreign(torch.nn.Module):
        def __init__(self, mixer: Any) -> None:
            super().__init__()
            self.inner, self.initial_state = mixer, mixer.initial_state

        def forward(self, x: Tensor, state: Any, *extra: object) -> Any:
            return self.inner(x, state, *extra)

    model = make(MODELS["softmax"])
    block: Any = model.stack.blocks[0]
    block.mixer = Foreign(block.mixer)
    prompt = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert isinstance(open_reader(model, model.initial_state(2)), ReadAgain)
    result = speculate(model, "lookup", prompt, 20, Speculation(pace="own"), seed=1)
    assert torch.equal(result.tokens[:, 3:], plain(model, prompt, 20, Sampling(), 1))


def test_a_model_cut_short_is_that_of_fewer_layers_or_passes() -> None:
    tokens = torch.randint(V, (2, 30), generator=torch.Generator().manual_seed(0))
    copying = {"match_length": "both", "memory": 16, "second": 2}
    for kind, more in (("conv", {"copy_memory": copying}), ("softmax", {"copy_memory": copying}), ("toeplitz", {})):
        model, expected = make(MODELS[kind] | {"layers": 3} | more), make(MODELS[kind] | {"layers": 2} | more)
        whole = model(tokens).logits
        for name, parameter in expected.named_parameters():
            longer = model.get_parameter(name).data  # of the gates of copies
            parameter.data = longer[: len(parameter)] if parameter.ndim else longer
        torch.testing.assert_close(first_layers(model, 2)(tokens).logits, expected(tokens).logits)
        assert torch.equal(model(tokens).logits, whole)
    model, expected = make(MODELS["refined"]), make(STACK | {"refinement": {"steps": 1}})
    expected.load_state_dict(model.state_dict())
    torch.testing.assert_close(fewer_passes(model, 1)(tokens).logits, expected(tokens).logits)


def test_what_cannot_be_is_one_line() -> None:
    model, prompt = make(STACK), torch.tensor([[1, 2, 3], [1, 2, 3]])

    def error(draft: Any = "lookup", speculation: Speculation | None = None, verifier: CausalLM = model) -> str:
        with pytest.raises(InputError) as raised:
            speculate(verifier, draft, prompt, 5, speculation)
        assert "\n" not in str(raised.value)
        return str(raised.value)

    assert error(speculation=Speculation("block")).startswith("rule 'block': got 2 rows in lockstep")
    assert "ends at 40 positions; give pace 'lockstep'" in error(
        speculation=Speculation(pace="own"), verifier=make(MODELS["dense"])
    )
    assert error("self:2") == "draft: got self:2; allowed: 1 to 1, as this model has 2 layers"
    assert "this model has one pass, which cannot be left out" in error("self:passes=1")
    assert error("lookups").startswith("draft: got 'lookups'; allowed: ngram:N, lookup, self:J")
    for verifier in (model, kmixer.load("shakespeare-small")):
        assert "this model was loaded from none; give a file of kmixer ngram" in error("ngram:3", verifier=verifier)
    assert "it has other tokens (5 tokens) than the model (7 tokens)" in error(CausalLM(parse(STACK), 5).eval())
    assert error(make(MODELS["dense"])).startswith("draft: the dense base kernel ends at 40 positions")
    assert error(make(STACK).train()) == "draft: got a model in training mode; call draft.eval() first"
    assert error(verifier=make(STACK).train()) == "model: got one in training mode; call model.eval() first"
    loaded = kmixer.LanguageModel(parse(STACK), V)
    with pytest.raises(InputError, match="speculation: got settings without a draft"):
        loaded.generate(prompt, speculation=Speculation())
    with pytest.raises(InputError, match="no tokenizer: give the prompt as tokens"):
        speculate(loaded.eval(), "lookup", "abc", 5)
