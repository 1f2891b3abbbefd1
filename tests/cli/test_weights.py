"""`--weights`: matrices of 16 or 8 bits on the command line, or why a model has none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import kmixer
from kmixer import native
from kmixer.errors import InputError
from kmixer.generation.prepared import PreparedDecoder
from kmixer.runs.recipe import LanguageRecipe
from kmixer.training.loop import train
from tests.cli.conftest import Run
from tests.conftest import tiny_recipe_values

compiled = pytest.mark.skipif(native.kernels() is None, reason="the compiled kernels were not built")


@pytest.fixture
def trained(text_file: Path, tmp_path: Path) -> Path:
    train(LanguageRecipe.parse(tiny_recipe_values(text_file), source="test"), tmp_path / "trained")
    return tmp_path / "trained"


@compiled
def test_eval_of_a_stream_says_what_rounding_costs(kmixer_command: Run, trained: Path) -> None:
    losses = {}
    for weights in ("float32", "bfloat16", "int8"):
        answer = json.loads(kmixer_command("eval", trained, "--protocol", "stream", "--weights", weights, "--json").out)
        losses[weights] = answer["loss"]
        assert answer.get("weights", "float32") == weights
    assert len(set(losses.values())) == 3
    assert max(losses.values()) - min(losses.values()) < 0.05
    page = kmixer_command("eval", trained, "--protocol", "stream", "--weights", "int8").out
    assert "decoded with matrices in int8" in page.splitlines()[0]


@compiled
def test_text_is_written_with_fewer_bits(kmixer_command: Run, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    before = PreparedDecoder.__init__

    def noted(self: PreparedDecoder, model: Any, *arguments: Any, **more: Any) -> None:
        made.append(model.decoded_in)
        before(self, model, *arguments, **more)

    monkeypatch.setattr(PreparedDecoder, "__init__", noted)
    command = ["generate", trained, "--prompt", "a", "--max-new-tokens", 5, "--seed", 1]
    assert kmixer_command(*command, "--weights", "int8").code == 0
    assert set(made) == {"int8"}
    model = kmixer.load(trained, weights="bfloat16")
    assert model.generate("a", max_new_tokens=3, seed=1).startswith("a")
    assert made[-1] == "bfloat16"


def test_rounded_weights_without_a_step_that_has_them_are_named(
    kmixer_command: Run, text_file: Path, trained: Path, tmp_path: Path
) -> None:
    eager = tiny_recipe_values(text_file)
    eager["model"] = {"kind": "transformer", "width": 8, "layers": 1, "heads": 2, "mixers": "hierarchical"}
    train(LanguageRecipe.parse(eager, source="test"), tmp_path / "eager")
    answer = kmixer_command("generate", tmp_path / "eager", "--prompt", "a", "--weights", "int8")
    assert answer.error().startswith("error: weights: got int8; this model is decoded in float32 alone: ")
    with pytest.raises(InputError, match=r"^weights: got bfloat16; this model is decoded in float32 alone: stack"):
        kmixer.load(tmp_path / "eager", weights="bfloat16")
    for more in ([], ["--documents"], ["--tasks", "piqa", "--protocol", "stream"]):
        answer = kmixer_command("eval", trained, "--weights", "int8", *more)
        assert answer.error().startswith("error: --weights int8 is of decoding, token after token: add --protocol")
