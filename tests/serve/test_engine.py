"""The engine's promise: an answer depends on model, prompt, settings and seed alone, bit for bit."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
import torch

import kmixer
from kmixer import native
from kmixer.errors import InputError
from kmixer.generation.sampling import Sampling
from kmixer.models import ModelConfig
from kmixer.serve import engine as engines
from kmixer.serve.engine import ClosedError, Engine, FullError
from kmixer.serve.jobs import Ended
from kmixer.serve.sessions import Standing
from tests.serve.conftest import running

PROMPT = "KING RICHARD:\nNow is the winter of our discontent"
LONG = PROMPT * 14
compiled = pytest.mark.skipif(native.kernels() is None, reason="the compiled kernels were not built")


@compiled
@pytest.mark.parametrize("which", ["model", "copying"])
def test_an_answer_is_the_same_alone_and_under_load_cold_and_warm(which: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(which)
    generator = random.Random(1)
    with running(model, rows=16) as (_, ask):
        alone = {seed: ask(LONG, 40, seed, top=3).wait() for seed in (1, 2, 3)}
    with running(model, rows=16) as (engine, ask):
        others = [
            ask(LONG[: generator.randint(1, 600)], generator.randint(1, 60), generator.randint(0, 99))
            for _ in range(20)
        ]
        asked = [ask(LONG, 40, seed, top=3) for seed in (1, 2, 3, 1, 2, 3)]
        others += [ask(PROMPT, 30, seed, sampling=Sampling(1.1, top_k=9, top_p=0.9)) for seed in range(10)]
        for one in asked:
            one.wait()
            expected = alone[one.job.seeds[0]]
            assert one.text == expected.text
            assert one.scored == expected.scored
        warm = ask(LONG, 40, 1, top=3).wait()
        assert warm.read.cached == 512
        assert (warm.text, warm.scored) == (alone[1].text, alone[1].scored)
        for one in others:
            one.wait()
            assert (
                ask(one.job.tokens, one.job.max_tokens, one.job.seeds[0], sampling=one.job.sampling).wait().text
                == one.text
            )
        assert (engine.active, engine.waiting) == (0, 0)


@compiled
def test_the_text_is_that_of_generate(model: kmixer.LanguageModel) -> None:
    with running(model) as (_, ask):
        for seed in (1, 7):
            text = ask(PROMPT, 50, seed).wait().text
            assert PROMPT + text == model.generate(PROMPT, 50, temperature=0.8, seed=seed)


def test_log_probabilities_are_the_models(model: kmixer.LanguageModel) -> None:
    assert model.tokenizer is not None
    tokens = torch.from_numpy(model.tokenizer.encode(PROMPT))[None]
    with torch.no_grad():
        logprobs = torch.log_softmax(model(tokens).logits[0].double(), -1)
    with running(model) as (_, ask):
        asked = ask(PROMPT, 0, top=2, score=True).wait()
        assert (asked.text, asked.pieces[0].finish) == ("", "length")
        scored = asked.read.scored
        assert [one.offset for one in scored] == list(range(len(PROMPT)))
        assert scored[0].logprob is None
        for t, one in enumerate(scored[1:]):
            assert one.logprob == pytest.approx(float(logprobs[t, one.token]), abs=1e-4)
            assert [token for token, _ in one.top] == logprobs[t].topk(2).indices.tolist()
        drawn = ask(PROMPT, 3, top=0).wait()
        assert drawn.scored[0].logprob == pytest.approx(float(logprobs[-1, drawn.scored[0].token]), abs=1e-4)


def test_choices_share_the_prompt_and_have_seeds_of_their_own(model: kmixer.LanguageModel) -> None:
    with running(model) as (_, ask):
        several = ask(LONG, 20, seeds=(5, 6, 7)).wait()
        assert several.read.tokens == len(LONG)
        assert several.texts == [ask(LONG, 20, seed).wait().text for seed in (5, 6, 7)]
        assert [piece.tokens for piece in several.pieces if piece.finish] == [20, 20, 20]


@pytest.mark.parametrize("stop", [("e",), ("the", "e t"), ("never there",)])
def test_a_stop_text_ends_the_answer_before_it(model: kmixer.LanguageModel, stop: tuple[str, ...]) -> None:
    with running(model) as (_, ask):
        whole = ask(PROMPT, 60, 3).wait().text
        asked = ask(PROMPT, 60, 3, stop=stop, top=0).wait()
        ends = [whole.index(text) for text in stop if text in whole]
        assert asked.text == whole[: min(ends, default=60)]
        assert asked.pieces[-1].finish == ("stop" if ends else "length")
        assert "".join(model.tokenizer.decode([one.token]) for one in asked.scored) == asked.text  # type: ignore[union-attr]


def test_a_session_goes_on_where_it_ended(model: kmixer.LanguageModel) -> None:
    with running(model) as (_, ask):
        begin = Standing(model.initial_state(1))
        first = ask(PROMPT, 10, begin=begin).wait()
        standing = first.ended.standing
        assert standing is not None
        assert standing.tokens == len(PROMPT) + 10
        second = ask(" and ", 15, begin=standing).wait()
        assert second.read.tokens == 5
        once = ask(PROMPT + first.text + " and ", 15).wait()
        assert second.text == once.text  # of these models: rounding differs
        stopped = ask(PROMPT, 60, 3, begin=begin, stop=("e",)).wait()
        standing = stopped.ended.standing
        assert standing is not None
        assert standing.tokens == len(PROMPT + stopped.text)
        assert ask("x", 15, begin=standing).wait().text == ask(PROMPT + stopped.text + "x", 15).wait().text


@compiled
def test_a_prompt_is_read_once_however_often_its_session_is_forked(model: kmixer.LanguageModel) -> None:
    with running(model) as (engine, ask):
        read = []
        engine._meter.read = lambda tokens, cached: read.append(tokens)  # type: ignore[method-assign]
        standing = ask(LONG, 0, begin=Standing(model.initial_state(1))).wait().ended.standing
        texts = [ask("", 12, seed, begin=standing).wait().text for seed in range(10)]
        assert read == [len(LONG) - 1, *[1] * 10]
        assert texts == [ask(LONG, 12, seed).wait().text for seed in range(10)]


def test_rows_of_who_leaves_are_free_at_once(model: kmixer.LanguageModel) -> None:
    with running(model, rows=2, waiting=3) as (engine, ask):
        long = [ask(PROMPT, 100_000, seed) for seed in range(2)]
        for one in long:
            one.events.get(timeout=20)
        line = [ask(PROMPT, 5, seed) for seed in range(3)]
        while engine.waiting != 3:
            time.sleep(0.01)
        with pytest.raises(FullError, match=r"^3 requests are waiting, the most that may \(--waiting\); try again$"):
            ask(PROMPT)
        engine.cancel(line[1].job)
        engine.cancel(long[0].job)
        for one in (line[0], line[2]):
            one.wait(10)
        assert line[1].events.empty()
        engine.cancel(long[1].job)
        end = time.monotonic() + 5
        while engine.active and time.monotonic() < end:
            time.sleep(0.005)
        assert engine.active == 0


def test_a_long_prompt_does_not_keep_others_waiting(model: kmixer.LanguageModel) -> None:
    with running(model, prefix_memory=0) as (engine, ask):
        long = ask(LONG * 40, 1)
        short = [ask(PROMPT, 5, seed).wait(20) for seed in range(3)]
        assert long.events.empty(), "the long prompt was read first"
        assert len({one.text for one in short}) == 3
        engine.cancel(long.job)


def test_closed_it_answers_what_is_there_and_takes_nothing_more(model: kmixer.LanguageModel) -> None:
    with running(model, rows=1) as (engine, ask):
        first, second = ask(PROMPT, 40), ask(PROMPT, 10)
        engine.close()
        with pytest.raises(ClosedError, match=r"^the server is stopping"):
            ask(PROMPT)
        assert len(first.wait().text) == 40
        assert len(second.wait().text) == 10
    with running(model) as (engine, ask):
        long = ask(PROMPT, 100_000)
        engine.stop()
        assert long.wait().ended == Ended(error="the server is stopping")


def test_when_the_thread_dies_everybody_is_told(model: kmixer.LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    died: list[str] = []

    def break_down(self: Engine) -> None:
        raise RuntimeError("no more")

    with running(model, failed=lambda: died.append("yes")) as (engine, ask):
        first = ask(PROMPT, 100_000)
        monkeypatch.setattr(Engine, "_write", break_down)
        assert first.wait().ended.error == "the server's engine has failed: RuntimeError: no more"
        engine._thread.join(5)
        assert died == ["yes"]
        with pytest.raises(ClosedError):
            ask(PROMPT)


def test_logits_that_are_no_numbers_end_their_answer_alone(
    model: kmixer.LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(model) as (engine, ask):
        good = ask(PROMPT, 2000, 1)
        good.seen.append(good.events.get(timeout=20))
        whole = engine._begin_writing

        def spoil(reading: Any) -> None:
            whole(reading)
            engine._logits[len(engine._choices) - 1] = torch.nan

        monkeypatch.setattr(engine, "_begin_writing", spoil)
        bad = ask(PROMPT, 20, 2)
        assert str(bad.wait().ended.error).startswith("logits: got NaN or infinity")
        assert len(good.wait().text) == 2000


def test_models_whose_state_grows_answer_one_at_a_time() -> None:
    config = ModelConfig.parse({"width": 16, "layers": 1, "rank": 3, "copy_memory": {}}, source="test")
    torch.manual_seed(0)
    growing = kmixer.LanguageModel(config, 256).eval()
    from kmixer.data.tokenizers import ByteTokenizer

    growing.tokenizer = ByteTokenizer()
    with running(growing, rows=64) as (engine, ask):
        assert engine.rows == 1
        assert engine.alone == "its copy memory grows with the text"
        asked = [ask("a" * 700, 20, seed) for seed in (1, 2, 1)]
        texts = [one.wait().text for one in asked]
        assert texts[0] == texts[2] != texts[1]
        assert asked[2].read.cached == 0
        assert "a" * 700 + texts[0] == growing.generate("a" * 700, 20, temperature=0.8, seed=1)


def test_what_cannot_be_answered_is_refused(model: kmixer.LanguageModel) -> None:
    config = ModelConfig.parse(
        {"width": 16, "layers": 1, "rank": 3, "base_kernel": {"kind": "dense", "size": 20}}, source="test"
    )
    ending = kmixer.LanguageModel(config, 65, model.tokenizer).eval()
    with running(ending) as (_, ask):
        with pytest.raises(InputError, match=r"^prompt and new tokens are 21 positions; .* ends at 20"):
            ask("a" * 10, 11)
        assert len(ask("a" * 10, 10).wait().text) == 10
    with running(model, rows=4) as (_, ask):
        with pytest.raises(InputError, match=r"^n: got 5; allowed: 1 to 4"):
            ask("a", seeds=(1, 2, 3, 4, 5))
        with pytest.raises(InputError, match=r"^prompt: got no token"):
            ask("")


def test_memory_does_not_grow(model: kmixer.LanguageModel) -> None:
    with running(model, rows=8, prefix_memory=200_000) as (engine, ask):
        for turn in range(3):
            for one in [ask(LONG[turn + seed :], 30, seed, stop=("zz",)) for seed in range(12)]:
                one.wait()
        assert engine.prefixes.nbytes <= 200_000
        kept = (engine._choices, engine._began, engine._standings, engine._texts, engine._open, engine._prompts.jobs)
        assert not any(kept)
        assert len(engine._turns) == engines.MOST_TURNS
