"""Whole models: rates and parts of the roof are those of the times; a series ends where it takes too long."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from kmixer.bench import length, models
from kmixer.bench.length import SERIES, LengthSpeed, bench_length
from kmixer.bench.measure import Timing
from kmixer.bench.models import TrainingSpeed, bench_decode, bench_train, build
from kmixer.bench.peers import SIZES, counted, present
from kmixer.bench.peers import build as build_peer
from kmixer.errors import InputError
from kmixer.runs.recipe import LanguageRecipe, load_language_recipe


def size_of(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


SMALL = ["training.batch_size=2", "training.window=16", "model.layers=1"]


@pytest.fixture
def recipe() -> LanguageRecipe:
    return load_language_recipe("shakespeare-quick", SMALL)


def test_a_training_rate_is_that_of_its_steps(recipe: LanguageRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(call: Callable[[], object], repeats: int, longest: float) -> Timing:
        call()  # a step of training works
        return Timing(9.0, 0.5)

    monkeypatch.setattr(models, "time_calls", timed)
    parameters = size_of(build(recipe, "recipe"))
    speed = bench_train(recipe, "recipe", "float32", 1, flops=6.0 * parameters * 128)
    assert speed == TrainingSpeed("shakespeare-quick", "recipe", parameters, 2, 16, "float32", 9.0, 0.5, 64.0, 0.5)
    assert bench_train(recipe, "recipe", "bfloat16", 1).part_of_roof is None


def test_decoding_says_what_it_did(recipe: LanguageRecipe) -> None:
    speed = bench_decode(recipe, "recipe", batch_size=2, context=20, tokens=4)
    assert (speed.batch_size, speed.context, speed.prepared) == (2, 20, True)
    assert min(speed.seconds_to_first_token, speed.tokens_per_second, speed.second_half_over_first) > 0


def test_the_transformer_beside_a_recipe_is_of_its_size(recipe: LanguageRecipe) -> None:
    ours, other = (size_of(build(recipe, model)) for model in ("recipe", "transformer"))
    assert other == pytest.approx(ours, rel=0.1)
    with pytest.raises(InputError, match="is a transformer already"):
        build(load_language_recipe("transformer-plays"), "transformer")


def test_a_series_ends_with_a_step_that_takes_too_long(recipe: LanguageRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def speed(recipe: LanguageRecipe, model: str, precision: str, repeats: int, longest: float) -> TrainingSpeed:
        config = recipe.training
        seconds = config.window / 10
        rate = config.batch_size * config.window / seconds
        sizes = (config.batch_size, config.window)
        return TrainingSpeed(recipe.name, model, 1, *sizes, precision, seconds, seconds, rate, None)  # type: ignore[arg-type]

    monkeypatch.setattr(length, "bench_train", speed)
    rows = list(
        bench_length(lambda more: load_language_recipe("shakespeare-quick", [*SMALL, *more]), 64, 3.0, 1, (16, 32, 64))
    )
    assert [(row.series, row.speed.window, row.speed.batch_size) for row in rows] == [
        (name, window, 64 // window) for name in SERIES for window in (16, 32)
    ]
    assert isinstance(rows[0], LengthSpeed)
    assert "part_of_roof" not in rows[0].to_json()


@pytest.mark.parametrize("name", ["0.17M", "87M"])
def test_peers_are_of_our_size(name: str) -> None:
    with torch.device("meta"):
        sizes = {peer.name: counted(build_peer(peer, SIZES[name], 2048)) for peer in present()}
    assert max(sizes.values()) < 1.2 * min(sizes.values())
