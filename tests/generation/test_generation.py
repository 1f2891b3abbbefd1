"""Sampling and streaming generation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kmixer
from kmixer.data.tokenizers import ByteTokenizer
from kmixer.errors import InputError
from kmixer.generation.sampling import Sampling
from kmixer.generation.streaming import generate_tokens, until
from kmixer.models import ModelConfig
from kmixer.state import State
from kmixer.training.loop import train
from tests.training.test_loop import make_recipe


@pytest.fixture
def model(text_file: Path, tmp_path: Path) -> Any:
    train(make_recipe(text_file, steps=2), tmp_path / "run")
    return kmixer.load(tmp_path / "run")


logits = st.lists(st.integers(-40, 40), min_size=2, max_size=12, unique=True).map(lambda x: torch.tensor([x]) / 8)


@given(logits, st.integers(1, 12))
def test_top_k_keeps_the_k_likeliest(values: torch.Tensor, k: int) -> None:
    kept = Sampling(top_k=k).probabilities(values)[0] > 0
    expected = torch.zeros_like(kept)
    expected[values[0].topk(min(k, values.shape[1])).indices] = True
    assert torch.equal(kept, expected)


@given(logits, st.floats(0.05, 1.0))
def test_top_p_keeps_the_smallest_sufficient_set(values: torch.Tensor, p: float) -> None:
    plain = torch.softmax(values[0].double(), -1)
    probabilities = Sampling(top_p=p).probabilities(values)[0]
    kept = probabilities > 0
    assert plain[kept].sum() >= p - 1e-12
    assert plain[kept].sum() - plain[kept].min() < p
    assert plain[~kept].sum() == 0 or plain[kept].min() >= plain[~kept].max()
    torch.testing.assert_close(probabilities[kept], plain[kept] / plain[kept].sum())


def test_temperature_sharpens_and_zero_takes_the_likeliest() -> None:
    values = torch.tensor([[1.0, 2.0, 0.5]])
    torch.testing.assert_close(
        Sampling(temperature=0.5).probabilities(values), torch.softmax(2 * values.double(), dim=-1)
    )
    assert Sampling(temperature=0.0)(values).tolist() == [1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature: got -1.0; allowed: 0"),
        ({"temperature": float("nan")}, "temperature: got nan"),
        ({"top_k": 0}, "top_k: got 0; allowed: 1 or more"),
        ({"top_p": 0.0}, "top_p: got 0.0; allowed: above 0, up to 1"),
        ({"top_p": 1.5}, "top_p: got 1.5"),
    ],
)
def test_settings_out_of_range_are_named(options: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Sampling(**options)


def test_generation_is_repeatable_and_returns_the_whole(model: Any) -> None:
    text = model.generate("The ", max_new_tokens=50, seed=7)
    assert text == model.generate("The ", max_new_tokens=50, seed=7)
    assert text != model.generate("The ", max_new_tokens=50, seed=8)
    assert text.startswith("The ")
    assert len(text) == 54
    assert "The " + "".join(model.generate("The ", max_new_tokens=50, seed=7, stream=True)) == text
    assert model.generate("The ", max_new_tokens=0) == "The "


def test_greedy_generation_is_that_of_rerunning_the_model(model: Any) -> None:
    prompt = torch.from_numpy(model.tokenizer.encode("A dictionary "))[None].repeat(2, 1)
    prompt[1] = prompt[1].flip(0)
    tokens = prompt
    with torch.no_grad():
        for _ in range(20):
            tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(model.generate(prompt, max_new_tokens=20, temperature=0.0), tokens)


def test_generation_continues_from_a_state(model: Any) -> None:
    prompt = torch.from_numpy(model.tokenizer.encode("A dictionary "))[None]
    whole = list(generate_tokens(model, prompt, 10, Sampling(temperature=0.0)))
    with torch.no_grad():
        state = model(prompt[:, :6]).state
    assert list(generate_tokens(model, prompt[:, 6:], 10, Sampling(temperature=0.0), state=state)) == whole


def test_a_long_prompt_is_read_in_pieces(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = torch.randint(10, (1, 100), generator=torch.Generator().manual_seed(0))
    whole = list(generate_tokens(model, prompt, 5, Sampling(temperature=0.0)))
    monkeypatch.setattr("kmixer.generation.reading.PREFILL_CHUNK", 7)
    assert list(generate_tokens(model, prompt, 5, Sampling(temperature=0.0))) == whole


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.integers(1, 5))
def test_text_ends_before_the_first_stop(text: str, stop: list[str], size: int) -> None:
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    ends = [text.index(word) for word in stop if word in text]
    assert "".join(until(iter(pieces), stop)) == text[: min(ends, default=len(text))]


def test_text_ends_at_the_same_place_whatever_the_pieces() -> None:
    """20,000 cases of the fault's kind: letter by letter, as one piece and in pieces of any sizes."""
    assert "".join(until(iter("bbaab"), ["a", "bbab", "bbaa"])) == "".join(
        until(iter(["bbaab"]), ["a", "bbab", "bbaa"])
    )
    random = Random(0)
    for _ in range(20_000):
        text = "".join(random.choices("ab", k=random.randrange(12)))
        stop = ["".join(random.choices("ab", k=random.randrange(1, 5))) for _ in range(random.randrange(4))]
        cuts = sorted(random.choices(range(len(text) + 1), k=3))
        pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        expected = text[: min((text.index(word) for word in stop if word in text), default=len(text))]
        for given_pieces in ([text], list(text), pieces):
            assert "".join(until(iter(given_pieces), stop)) == expected, (text, stop, given_pieces)


def test_generation_ends_as_soon_as_no_other_stop_can_begin_earlier() -> None:
    taken = []

    def pieces() -> Iterator[str]:
        for letter in "xbbaayyy":
            taken.append(letter)
            yield letter

    assert "".join(until(pieces(), ["a", "bbab"])) == "xbb"
    assert "".join(taken) == "xbbaa"  # after "xbba" the stop "bbab" could still begin before "a"


def test_text_is_not_held_back_without_need() -> None:
    arrived = []
    for piece in until(iter(["ab", "c", "<", "e"]), ["<end>"]):
        arrived.append(piece)
    assert arrived == ["ab", "c", "<e"]


@pytest.mark.parametrize("temperature", [0.0, 1e-300, 0.8])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_an_error(temperature: float, bad: float) -> None:
    values = torch.tensor([[1.0, 2.0, 0.5], [1.0, bad, 0.5]])
    for logits in (values, torch.full((1, 3), -torch.inf)):
        with pytest.raises(InputError, match=r"^logits: got NaN or infinity, from which no token can be drawn; .*$"):
            Sampling(temperature=temperature)(logits)


def test_a_model_with_damaged_weights_says_so(model: Any) -> None:
    with torch.no_grad():
        model.norm.weight[0] = float("nan")
    for temperature in (0.0, 1.0):
        with pytest.raises(InputError, match="logits: got NaN or infinity"):
            model.generate("The ", max_new_tokens=2, temperature=temperature)


@given(st.integers(0, 1000), st.integers(1, 12))
@settings(max_examples=15)
def test_streamed_pieces_are_the_text_of_the_whole(seed: int, count: int) -> None:
    torch.manual_seed(0)
    model = kmixer.LanguageModel(ModelConfig.parse({"width": 8, "layers": 1, "rank": 2}, source="test"), 256)
    model.tokenizer = tokenizer = ByteTokenizer()
    prompt = tokenizer.encode("é: ")
    tokens = model.generate(torch.from_numpy(prompt)[None], max_new_tokens=count, seed=seed)[0].tolist()
    pieces = list(model.generate("é: ", max_new_tokens=count, seed=seed, stream=True))
    assert "é: " + "".join(pieces) == tokenizer.decode(tokens) == model.generate("é: ", max_new_tokens=count, seed=seed)


def test_generating_leaves_the_mode_as_it_was(model: Any) -> None:
    for training in (True, False):
        model.train(training)
        model.generate("The ", max_new_tokens=2)
        list(model.generate("The ", max_new_tokens=2, stream=True))
        assert model.training is training


def test_a_tiny_temperature_takes_the_likeliest() -> None:
    assert Sampling(temperature=1e-320)(torch.tensor([[1.0, 3.0, 2.0]])).tolist() == [1]


def test_prompts_that_cannot_be_are_named(model: Any) -> None:
    with pytest.raises(InputError, match="the tokenizer does not know '☃'"):
        model.generate("snow ☃", max_new_tokens=5)
    with pytest.raises(InputError, match='prompt: got ""; give one character or more'):
        model.generate("", max_new_tokens=5)
    with pytest.raises(InputError, match=r"tokens: got 9999; allowed: 0 to"):
        model.generate(torch.tensor([[9999]]), max_new_tokens=5)
    with pytest.raises(InputError, match=r"seed: got -1; allowed: 0 to"):
        model.generate("a", max_new_tokens=5, seed=-1)
    with pytest.raises(InputError, match=r"does not know '\\udcff'"):
        model.generate("a\udcff", max_new_tokens=5)
    with pytest.raises(InputError, match="max_new_tokens: got -1"):
        model.generate("a", max_new_tokens=-1)
    fresh = kmixer.LanguageModel.from_recipe("shakespeare-quick")
    with pytest.raises(InputError, match="no tokenizer: give the prompt as tokens"):
        fresh.generate("a", max_new_tokens=1)


def test_a_model_with_a_window_says_where_it_ends() -> None:
    values = {"width": 8, "layers": 1, "rank": 2, "base_kernel": {"kind": "dense", "size": 20}}
    model = kmixer.LanguageModel(ModelConfig.parse(values, source="test"), 10)
    prompt = torch.zeros(1, 5, dtype=torch.long)
    assert model.generate(prompt, max_new_tokens=15).shape == (1, 20)
    with pytest.raises(InputError, match=r"the dense base kernel ends at 20: ask for 15 or fewer .* which stream"):
        model.generate(prompt, max_new_tokens=16)


@pytest.mark.parametrize("kind", ["conv", "toeplitz"])
def test_the_state_keeps_its_size(kind: str) -> None:
    values = {"width": 8, "layers": 2, "rank": 2, "base_kernel": {"kind": kind, "size": 20}}
    model = kmixer.LanguageModel(ModelConfig.parse(values, source="test"), 10).eval()
    state = model.initial_state(1)
    sizes = [x.shape for x in tensors_of(state)]
    assert len(sizes) == 4
    with torch.inference_mode():
        for _ in range(30):
            state = model(torch.ones(1, 3, dtype=torch.long), state).state
            assert [x.shape for x in tensors_of(state)] == sizes
    # Nor does it keep a long input alive behind a small view.
    leaves = tensors_of(model(torch.ones(1, 500, dtype=torch.long)).state)
    assert all(x.untyped_storage().nbytes() == x.numel() * x.element_size() for x in leaves)


def tensors_of(state: State) -> list[torch.Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(state) if x is not None]
