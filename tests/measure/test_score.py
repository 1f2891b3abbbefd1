"""The surprise of a text: that of the model's losses, however the text comes, and highest where something is new."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kmixer.data.batches import random_windows
from kmixer.data.reading import Block
from kmixer.data.sentence_pieces import SentencePieceTokenizer
from kmixer.data.tokenizers import BytePairTokenizer, ByteTokenizer, CharTokenizer, Tokenizer
from kmixer.errors import InputError
from kmixer.language_model import LanguageModel
from kmixer.measure import score, surprise
from kmixer.measure.evaluation import stream_losses
from kmixer.measure.score import Summary, score_lines, score_tokens
from kmixer.measure.surprise import Surprise
from kmixer.runs.recipe import load_language_recipe

STREAMS = ["model.width=16", "model.layers=2", "model.rank=2"]
ENDS = [*STREAMS, "model.base_kernel.kind=dense", "model.base_kernel.size=24", "training.window=24"]
ENDS += ["evaluation.window=24"]


def model_of(tokenizer: Tokenizer, model_settings: list[str]) -> LanguageModel:
    torch.manual_seed(0)
    recipe = load_language_recipe("shakespeare-quick", model_settings)
    return LanguageModel(recipe.model, tokenizer.vocabulary_size, tokenizer).eval()


def transformer(tokenizer: Tokenizer) -> LanguageModel:
    torch.manual_seed(0)
    recipe = load_language_recipe("transformer-plays", ["model.width=16", "model.layers=1", "model.heads=2"])
    return LanguageModel(recipe.model, tokenizer.vocabulary_size, tokenizer).eval()


def cut(text: Block, sizes: list[int]) -> Iterator[Block]:
    start, index = 0, 0
    while start < len(text):
        size = sizes[index % len(sizes)]
        yield text[start : start + size]
        start, index = start + size, index + 1


@pytest.fixture(scope="module")
def tokenizers(text: str) -> list[Tokenizer]:
    return [
        CharTokenizer(text + "\r"),
        ByteTokenizer(),
        BytePairTokenizer.train([text], 300),
        SentencePieceTokenizer.train(text.splitlines(), 300),
    ]


def test_the_surprise_of_a_stream_is_its_loss(text: str) -> None:
    tokenizer = CharTokenizer(text)
    model = model_of(tokenizer, STREAMS)
    tokens = tokenizer.encode(text[:3000])
    whole = Surprise(model)(tokens)
    expected = torch.cat(list(stream_losses(model, torch.from_numpy(tokens))), dim=1)[0]
    assert math.isnan(whole[0])
    torch.testing.assert_close(torch.from_numpy(whole[1:]).float(), expected, atol=2e-5, rtol=1e-5)


@settings(max_examples=4)
@given(st.lists(st.integers(0, 90), min_size=1).filter(any))
def test_pieces_of_any_size_give_the_same(sizes: list[int]) -> None:
    tokenizer = ByteTokenizer()
    tokens = np.random.default_rng(0).integers(0, 256, 200)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(surprise, "CONTEXT", 40)
        for model in (model_of(tokenizer, STREAMS), model_of(tokenizer, ENDS), transformer(tokenizer)):
            whole = Surprise(model)(tokens)
            piecewise = Surprise(model)
            parts, start, index = [], 0, 0
            while start < len(tokens):
                size = sizes[index % len(sizes)]
                parts.append(piecewise(tokens[start : start + size]))
                start, index = start + size, index + 1
            np.testing.assert_allclose(np.concatenate(parts), whole, atol=2e-5)


@pytest.mark.parametrize("kind", ["dense", "attention", "window"])
def test_a_state_that_cannot_go_on_begins_anew_with_half_of_what_it_saw(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = ByteTokenizer()
    monkeypatch.setattr(surprise, "CONTEXT", 24)
    made = {"dense": lambda: model_of(tokenizer, ENDS), "attention": lambda: transformer(tokenizer)}
    model = made.get(kind, lambda: model_of(tokenizer, STREAMS))()
    tokens = torch.arange(100) * 7 % 256
    measured = Surprise(model, 24 if kind == "window" else None)(tokens.numpy())
    with torch.no_grad():
        for target in (1, 20, 24, 25, 36, 37, 60, 99):
            start = 0 if target <= 24 else (target - 25) // 12 * 12 + 12  # inputs from here on, 12 to 24 of them
            window = tokens[start:target][None]
            logits = model(window).logits
            expected = -torch.log_softmax(logits[0, -1].double(), -1)[tokens[target]]
            assert measured[target] == pytest.approx(float(expected), abs=2e-5)


@pytest.mark.parametrize("sizes", [[9], [1, 200, 40], [500, 3]])
def test_lines_are_the_same_however_the_text_comes(tokenizers: list[Tokenizer], text: str, sizes: list[int]) -> None:
    sample = "\n\n" + text[:150] + "\n" + "word " * 20 + "x" * 100 + "\r\nlast line without an end"
    for tokenizer in tokenizers:
        model = model_of(tokenizer, STREAMS)
        whole = list(score_lines(model, tokenizer, iter([sample])))
        lines = sample.split("\n")
        assert [line.number for line in whole] == list(range(1, len(lines) + 1))
        assert [line.text for line in whole] == [line.rstrip("\r")[: score.SHOWN_CHARACTERS] for line in lines]
        assert sum(line.bytes for line in whole) == len(sample.encode())
        for line, again in zip(whole, score_lines(model, tokenizer, cut(sample, sizes)), strict=True):
            assert (line.number, line.text, line.bytes, line.tokens) == (
                again.number, again.text, again.bytes, again.tokens,
            )  # fmt: skip
            assert line.nats == pytest.approx(again.nats, rel=1e-5, abs=1e-3)
        tokens = list(score_tokens(model, tokenizer, cut(sample, sizes)))
        assert tokens[0].nats is None
        assert sum(token.nats or 0 for token in tokens) == pytest.approx(sum(line.nats for line in whole), rel=1e-5)
        assert len(tokens) - 1 == sum(line.tokens for line in whole)
        assert {token.line for token in tokens} <= {line.number for line in whole}


def test_a_line_without_end_is_scored_in_parts(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kmixer.data.blocks.LONGEST_WAIT", 100)
    monkeypatch.setattr(score, "LONGEST_WAIT", 100)
    tokenizer = BytePairTokenizer.train([text], 300)
    model = model_of(tokenizer, STREAMS)
    sample = "short\n" + "words and more words " * 40 + "x" * 500 + "\nlast"
    whole = list(score_lines(model, tokenizer, iter([sample])))
    monkeypatch.setattr(score, "LONGEST_WAIT", 1 << 20)
    at_once = list(score_lines(model, tokenizer, iter([sample])))
    for part in (list(score_lines(model, tokenizer, cut(sample, [7]))), at_once):
        assert [(line.bytes, line.tokens) for line in part] == [(line.bytes, line.tokens) for line in whole]
        assert [line.nats for line in part] == pytest.approx([line.nats for line in whole], rel=1e-5, abs=1e-3)


def test_bytes_that_are_no_text_are_scored_too() -> None:
    raw = bytes(range(256)) * 3
    model = model_of(ByteTokenizer(), STREAMS)
    lines = list(score_lines(model, ByteTokenizer(), iter([raw])))
    assert len(lines) == 4
    assert sum(line.tokens for line in lines) == len(raw) - 1
    assert sum(line.bytes for line in lines) == len(raw)


def test_what_the_tokenizer_does_not_know_is_named_with_its_line() -> None:
    tokenizer = CharTokenizer("ab\n")
    with pytest.raises(InputError, match="line 3: the tokenizer does not know 'x'"):
        list(score_lines(model_of(tokenizer, STREAMS), tokenizer, iter(["a\nb", "\nax\n"])))


def regular_line(rng: random.Random) -> str:
    action = rng.choice(["opened", "closed", "read", "wrote"])
    return f"worker {rng.randrange(8)} {action} file {rng.randrange(100)} in {rng.randrange(10)} ms\n"


ANOMALIES = [
    "worker 3 wrote nothing in 7 ms",
    "kernel panic: no working init",
    "worker 2 opened door 12 in 3 ms",
    "disk error on device 4",
    "reworked 5 files",
    "ms 7 in 44 file read 2 worker",
    "worker worker worker worker",
    "out of memory",
    "worker 1 renamed file 10 in 3 ms",
    "connection refused by peer",
]


def test_planted_anomalies_are_the_most_surprising_lines() -> None:
    """20 among 3,000 lines of a log, after a training of seconds on other lines."""
    rng = random.Random(0)
    tokenizer = ByteTokenizer()
    torch.manual_seed(0)
    small = ["model.width=48", "model.layers=2", "model.rank=4"]
    # What is trained on 128 tokens cannot know how to forget after more.
    recipe = load_language_recipe("shakespeare-quick", [*small, "model.decay.range=[0.05,0.95]"])
    model = LanguageModel(recipe.model, 256, tokenizer).train()
    log = "".join(regular_line(rng) for _ in range(4000))
    tokens = torch.from_numpy(tokenizer.encode(log))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for step in range(150):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 150)
        x, y = random_windows(tokens, 128, 8, generator)
        losses = model(x, targets=y).losses
        assert losses is not None
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
    lines = [regular_line(rng) for _ in range(3000)]
    planted = sorted(rng.sample(range(100, 3000), 20))
    for index, number in enumerate(planted):
        lines[number] = ANOMALIES[index % len(ANOMALIES)] + "\n"
    summary = Summary(20)
    for line in score_lines(model.eval(), tokenizer, cut("".join(lines), [5000])):
        summary.add(line)
    surprising = summary.most_surprising()
    assert sorted(line.number - 1 for line in surprising) == planted
    assert [line.bits_per_byte for line in surprising] == sorted((x.bits_per_byte for x in surprising), reverse=True)
    assert summary.lines == 3000
    assert summary.bytes == len("".join(lines))


def test_a_window_longer_than_the_kernel_is_refused() -> None:
    with pytest.raises(InputError, match="window 25: the dense base kernel ends at position 24"):
        Surprise(model_of(ByteTokenizer(), ENDS), 25)
