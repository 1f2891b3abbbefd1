"""Costs counted from shapes, against published figures and sums made by hand."""

from __future__ import annotations

import json

import pytest

from kmixer.cli.inspect import account_of
from tests.cli.conftest import Run


@pytest.mark.parametrize(
    ("recipe", "parameters", "a_token", "training", "tokens", "a_parameter"),
    [
        ("gka-d20", 378_798_320, 2.4143e9, 6.709e18, 2.7787e9, 8.25),
        ("nanochat-d20", 896_535_720, 3.0042e9, 1.3725e19, 4.5686e9, 10.5),
    ],
)
def test_the_published_pair(
    recipe: str, parameters: int, a_token: float, training: float, tokens: float, a_parameter: float
) -> None:
    found = account_of(recipe)
    assert found.total_parameters == parameters
    assert found.training_flops == pytest.approx(a_token, rel=3e-5)
    assert found.total_training_flops == pytest.approx(training, rel=1e-4)
    assert found.trained_units == pytest.approx(tokens, rel=1e-4)
    assert found.trained_units / found.matrix_parameters == pytest.approx(a_parameter, rel=1e-3)


def test_the_cache_of_gaussian_attention_is_half_of_softmax() -> None:
    gaussian, softmax = account_of("gka-d20"), account_of("nanochat-d20")
    assert gaussian.cache_bytes_per_token == 20 * 1280 * 2
    assert softmax.cache_bytes_per_token == 2 * gaussian.cache_bytes_per_token
    assert gaussian.constant_state_bytes == softmax.constant_state_bytes == 0


def test_a_k_stack_keeps_its_state_whatever_the_length() -> None:
    found = account_of("k-operators-local-shakespeare")
    assert found.cache_bytes_per_token == 0
    # 6 layers of S (4, 64) and the last 7 inputs, at 2 bytes.
    assert found.constant_state_bytes == 6 * (4 * 64 + 7 * 64) * 2


def test_a_copy_memory_is_a_part_and_eight_bytes_a_token(kmixer_command: Run) -> None:
    recipe = "k-operators-copy-shakespeare"
    parts = json.loads(kmixer_command("params", recipe, "--json").out)
    assert parts["total"] == 178_692
    assert parts["parts"]["copy_memory"] == (65 + 1) * 64 + 6  # the table and a gate per layer
    everything, some = account_of(recipe), account_of(recipe, ["model.copy_memory.memory=65536"])
    assert everything.cache_bytes_per_token == 8
    assert some.cache_bytes_per_token == 0
    assert some.constant_state_bytes == everything.constant_state_bytes + 8 * 65536
    without = account_of("k-operators-local-shakespeare")
    assert everything.constant_state_bytes == without.constant_state_bytes
    assert everything.forward_flops == without.forward_flops  # a look-up, and a gate
    pointer = account_of(recipe, ["model.copy_memory.pointer=true"])
    assert pointer.parameters["pointer"] == 64 + 11


@pytest.mark.parametrize(
    ("size", "parameters", "flops", "gka_parameters", "gka_flops"),
    [("ti", 5.72, 2.51, 4.38, 1.98), ("s", 22.05, 9.20, 16.73, 7.11), ("b", 86.57, 35.13, 65.31, 26.76)],
)
def test_the_published_vision_pairs(
    size: str, parameters: float, flops: float, gka_parameters: float, gka_flops: float
) -> None:
    softmax = account_of(f"deit-{size}")
    gaussian = account_of(f"deit-{size}", ["model.mixers=gaussian"])
    assert round(softmax.total_parameters / 1e6, 2) == parameters
    assert round(softmax.forward_flops / 1e9, 2) == flops
    assert round(gaussian.total_parameters / 1e6, 2) == gka_parameters
    assert round(gaussian.forward_flops / 1e9, 2) == gka_flops


def test_the_commands_say_what_the_difference_is_made_of(kmixer_command: Run) -> None:
    answer = json.loads(kmixer_command("params", "gka-d20", "--json").out)
    assert answer["total"] == sum(answer["parts"].values()) == 378_798_320
    page = kmixer_command("params", "gka-d20", "--beside", "nanochat-d20").out
    for part in ("419,430,400     81.0% of it", "is 0.4225 of nanochat-d20", "477,105,320, of which gka-d20 is 0.794"):
        assert part in page
    assert "gka-d20 8.25, nanochat-d20 10.50" in page
    both = json.loads(kmixer_command("params", "gka-d20", "--beside", "nanochat-d20", "--json").out)
    assert both["difference"]["stack.value_embeddings"] == 419_430_400


def test_operations_are_printed_and_written(kmixer_command: Run) -> None:
    page = kmixer_command("flops", "gka-d20", "--beside", "nanochat-d20").out
    for part in ("2.4143e+09", "3.0042e+09", "1.3725e+19", "51,200", "102,400"):
        assert part in page
    answer = json.loads(kmixer_command("flops", "deit-ti", "--json").out)
    assert answer["unit"] == "image"
    assert answer["forward_flops"] == pytest.approx(2.51e9, rel=2e-3)
    assert "training FLOPs per image" not in kmixer_command("flops", "deit-ti").out
