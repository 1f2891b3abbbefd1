"""Training: resuming is exact, a diverged run keeps its last good state, and nothing is destroyed."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import kmixer
from kmixer.data.token_files import prepare_dataset
from kmixer.errors import DivergedError
from kmixer.measure.evaluation import evaluate, loss_by_position
from kmixer.runs.recipe import LanguageRecipe
from kmixer.runs.run_folder import RunFolder
from kmixer.tensor_files import load_tensors
from kmixer.training import loop
from kmixer.training.language import LanguageTask
from kmixer.training.loop import Reporter, train
from tests.conftest import tiny_recipe_values


def make_recipe(corpus: Path, **training: Any) -> LanguageRecipe:
    values = tiny_recipe_values(corpus)
    values["training"] |= training
    if "warmup_steps" not in training:
        values["training"]["warmup_steps"] = min(2, values["training"]["steps"])
    return LanguageRecipe.parse(values, source="test")


def metrics_without_times(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what two runs of one recipe do not share."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")} for line in lines]


def assert_same_run(first: Path, second: Path) -> None:
    assert metrics_without_times(first) == metrics_without_times(second)
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    ours, theirs = (load_tensors(run / "checkpoints/last.safetensors")[0] for run in (first, second))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


class CrashError(Exception):
    """A crash."""


class StopAfter(Reporter):
    def __init__(self, step: int) -> None:
        self.step = step

    def trained(self, step: int, loss: float, tokens_per_second: float, seconds_left: float) -> None:
        if step == self.step:
            raise CrashError


class InterruptAfter(StopAfter):
    def trained(self, step: int, loss: float, tokens_per_second: float, seconds_left: float) -> None:
        if step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("optimizer", ["muon", "grouped", "simple"])
def test_training_lowers_the_loss_and_repeats_bit_for_bit(optimizer: str, text_file: Path, tmp_path: Path) -> None:
    rate = {"muon_learning_rate": 0.02 if optimizer == "muon" else None}
    recipe = make_recipe(text_file, optimizer=optimizer, **rate)
    for name in ("one", "two"):
        result = train(recipe, tmp_path / name)
    assert result.finished
    assert_same_run(tmp_path / "one", tmp_path / "two")
    losses = [line["validation"][0]["loss"] for line in metrics_without_times(tmp_path / "one") if "validation" in line]
    assert len(losses) == 4  # before the first step, after steps 3 and 6, and at the end
    assert losses[-1] < losses[0] - 0.1
    assert result.best["loss"] == min(losses)


@pytest.mark.parametrize("crash", [1, 3, 4, 5, 7])
def test_a_crashed_run_resumes_bit_for_bit(crash: int, text_file: Path, tmp_path: Path) -> None:
    recipe = make_recipe(text_file)
    train(recipe, tmp_path / "whole")
    with pytest.raises(CrashError):
        train(recipe, tmp_path / "crashed", reporter=StopAfter(crash))
    train(recipe, tmp_path / "crashed", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "crashed")


@pytest.mark.parametrize(("step", "settings"), [(1, {}), (3, {}), (5, {}), (5, {"average": 0.9})])
def test_an_interrupted_run_is_saved_at_once_and_resumes_bit_for_bit(
    step: int, settings: dict[str, Any], text_file: Path, tmp_path: Path
) -> None:
    recipe = make_recipe(text_file, **settings)
    train(recipe, tmp_path / "whole")
    result = train(recipe, tmp_path / "parts", reporter=InterruptAfter(step))
    assert (result.step, result.finished) == (step, False)
    assert train(recipe, tmp_path / "parts", resume=True).finished
    resumed = json.loads((tmp_path / "parts/environment.json").read_text())["resumed"]
    assert [again["step"] for again in resumed] == [step]
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_finished_run_resumes_to_itself(text_file: Path, tmp_path: Path) -> None:
    recipe = make_recipe(text_file)
    train(recipe, tmp_path / "run")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert train(recipe, tmp_path / "run", resume=True).finished
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(("rate", "measured"), [(0.01, 1), (50.0, 2)])
def test_weights_that_are_best_and_last_are_measured_once(
    rate: float, measured: int, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = []
    final_measures = LanguageTask.final_measures
    monkeypatch.setattr(LanguageTask, "final_measures", lambda *task: count.append(1) or final_measures(*task))
    recipe = make_recipe(text_file, optimizer="simple", learning_rate=rate, muon_learning_rate=None, evaluate_every=8)
    train(recipe, tmp_path / "run")
    results = RunFolder(tmp_path / "run").results()
    assert results is not None
    losses = [line["validation"][0]["loss"] for line in metrics_without_times(tmp_path / "run") if "validation" in line]
    assert (losses[-1] == min(losses), len(count)) == (measured == 1, measured)
    assert results["best"]["validation"][0]["loss"] == pytest.approx(min(losses), rel=1e-6)
    assert results["last"]["validation"][0]["loss"] == pytest.approx(losses[-1], rel=1e-6)


def test_seeds_differ(text_file: Path, tmp_path: Path) -> None:
    for seed in (1, 2):
        train(make_recipe(text_file, seed=seed, steps=1), tmp_path / str(seed))
    first, second = (load_tensors(tmp_path / str(seed) / "model.safetensors")[0] for seed in (1, 2))
    assert not torch.equal(first["embedding.weight"], second["embedding.weight"])


def test_accumulation_gives_the_gradients_of_the_whole_batch(text_file: Path, tmp_path: Path) -> None:
    values = tiny_recipe_values(text_file)
    del values["model"]["dropout"]
    values["training"]["precision"] = "float64"
    curves = []
    for accumulation in (1, 2, 4):
        values["training"]["accumulation"] = accumulation
        train(LanguageRecipe.parse(values, source="test"), tmp_path / str(accumulation))
        curves.append([line.get("train_loss") for line in metrics_without_times(tmp_path / str(accumulation))])
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], abs=1e-12)


HEADS = {
    "linear": {},
    "gelu": {"head": {"kind": "gelu", "multiplier": 1}},
    "adaptive": {"head": {"kind": "adaptive", "cutoffs": [20, 50]}},
}


@pytest.mark.parametrize("head", HEADS)
def test_bfloat16_training_stays_close_to_float32(head: str, text_file: Path, tmp_path: Path) -> None:
    values = tiny_recipe_values(text_file)
    values["model"] |= HEADS[head] | {"dropout": {}}  # whose draws are others in other dtypes, and count for more
    for precision in ("float32", "bfloat16"):
        values["training"]["precision"] = precision
        train(LanguageRecipe.parse(values, source="test"), tmp_path / precision)
    full, half = (metrics_without_times(tmp_path / p)[-1]["validation"][0]["loss"] for p in ("float32", "bfloat16"))
    assert full != half
    assert math.isclose(full, half, abs_tol=0.05)
    assert load_tensors(tmp_path / "bfloat16" / "model.safetensors")[0]["embedding.weight"].dtype == torch.float32


def test_a_run_in_bfloat16_says_once_where_float32_is_faster(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    class Listening(Reporter):
        def warned(self, line: str) -> None:
            said.append(line)

    values = tiny_recipe_values(text_file)
    for precision, times in (("bfloat16", 4.25), ("bfloat16", None), ("float32", 4.25)):
        monkeypatch.setattr(loop, "slower_in_bfloat16", lambda device, times=times: times)
        values["training"]["precision"] = precision
        train(LanguageRecipe.parse(values, source="test"), tmp_path / f"{precision}-{times}", reporter=Listening())
    assert [line.partition(" this")[0] for line in said] == [
        "training.precision=bfloat16: matrix products in it take 4.2 times as long as in float32 on"
    ]


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kmixer.models.causal_lm import CausalLM

    recipe, run = make_recipe(text_file), tmp_path / "run"
    forward, calls = CausalLM.forward, [0]

    def broken(self: Any, tokens: Any, state: Any = None, targets: Any = None) -> Any:
        output = forward(self, tokens, state, targets)
        if self.training:
            calls[0] += 1
            if calls[0] == 5:
                return output._replace(losses=output.losses * torch.nan)
        return output

    monkeypatch.setattr(CausalLM, "forward", broken)
    with pytest.raises(DivergedError, match=r"step 5: loss nan.*keeps the best weights and the last good checkpoint"):
        train(recipe, run)
    tensors, metadata = load_tensors(run / "checkpoints/last.safetensors")
    assert metadata["step"] == 3
    assert json.loads((run / "diverged.json").read_text())["step"] == 4
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert train(recipe, run, resume=True).finished
    assert not RunFolder(run).diverged()


def recipe_without_a_finite_loss(corpus: Path) -> LanguageRecipe:
    values = tiny_recipe_values(corpus)
    values["model"].setdefault("decay", {})["alpha_cap"] = 1e39
    return LanguageRecipe.parse(values, source="test")


def test_a_run_that_diverges_before_its_first_step_leaves_what_was_there(text_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(make_recipe(text_file), run)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for out in (run, tmp_path / "new"):
        with pytest.raises(DivergedError, match="step 0: validation loss"):
            train(recipe_without_a_finite_loss(text_file), out, force=True)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert not (tmp_path / "new").exists()


def test_weights_that_are_not_finite_are_not_saved_on_an_interrupt(text_file: Path, tmp_path: Path) -> None:
    class Interrupt(Reporter):
        def trained(self, step: int, loss: float, tokens_per_second: float, seconds_left: float) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    recipe, run = make_recipe(text_file, learning_rate=1e39, warmup_steps=0), tmp_path / "run"
    with pytest.raises(DivergedError, match="weights are not finite"):
        train(recipe, run, reporter=Interrupt())
    tensors, metadata = load_tensors(run / "checkpoints/last.safetensors")
    assert metadata["step"] == 0
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())


def test_the_corpus_may_have_another_vocabulary_than_its_recipe(text_file: Path, text: str, tmp_path: Path) -> None:
    train(make_recipe(text_file, steps=1), tmp_path / "run")
    assert RunFolder(tmp_path / "run").read_recipe().tokenizer.vocabulary_size == len(set(text))
    assert kmixer.load(tmp_path / "run").vocabulary_size == len(set(text))


def test_an_evaluation_counts_every_position_once(text_file: Path, tmp_path: Path) -> None:
    """Both protocols against the plain sum over the model's own logits."""
    recipe, run = make_recipe(text_file, steps=3), tmp_path / "run"
    train(recipe, run)
    model = kmixer.load(run).double()
    split = prepare_dataset(recipe.data, model.tokenizer).validation
    tokens = split.tokens.long()
    with torch.no_grad():
        log_probabilities = torch.log_softmax(model(tokens[None, :-1]).logits, -1)
    expected = -log_probabilities.gather(-1, tokens[None, 1:, None]).mean().item()
    stream = evaluate(model, split, "stream", 32)
    assert (stream.tokens, stream.window) == (len(tokens) - 1, None)
    assert stream.loss == pytest.approx(expected, abs=1e-10)
    assert stream.perplexity == pytest.approx(math.exp(expected))
    assert stream.bits_per_byte == pytest.approx(expected / math.log(2) * len(tokens) / split.bytes)
    assert stream.perplexity_per_word == pytest.approx(math.exp(expected * len(tokens) / split.words))
    one_word = dataclasses.replace(split, counts=dataclasses.replace(split.counts, words=1))
    assert expected * len(tokens) > 710  # more than a float64 has the exponential of
    assert evaluate(model, one_word, "stream", 32).perplexity_per_word is None

    window = evaluate(model, split, "windows", 100)
    total = 0.0
    for start in range(0, window.tokens, 100):
        x, y = tokens[None, start : start + 100], tokens[None, start + 1 : start + 101]
        with torch.no_grad():
            total += model(x, targets=y).losses.sum().item()
    assert window.tokens == (len(tokens) - 1) // 100 * 100
    assert window.loss == pytest.approx(total / window.tokens, abs=1e-10)
    by_position = loss_by_position(model, split, 100)
    edges = [0, 1, 2, 4, 8, 16, 32, 64, 100]
    means = [sum(by_position[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    assert window.stretches == pytest.approx(means, abs=1e-10)
    assert stream.stretches is None
