"""Costs counted from shapes, against published figures and sums made by hand."""

from __future__ import annotations

import pytest

from kmixer.models.accounting import Account, account
from kmixer.training.recipe import load_recipe


def costs(recipe: str) -> Account:
    loaded = load_recipe(recipe)
    config = loaded.training
    tokens = config.steps * config.batch_size * config.window
    return account(loaded.model, loaded.tokenizer.vocabulary_size, window=config.window, tokens=tokens)


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
    found = costs(recipe)
    assert found.total_parameters == parameters
    assert found.training_flops == pytest.approx(a_token, rel=3e-5)
    assert found.total_training_flops == pytest.approx(training, rel=1e-4)
    assert found.tokens == pytest.approx(tokens, rel=1e-4)
    assert found.tokens / found.matrix_parameters == pytest.approx(a_parameter, rel=1e-3)


def test_the_cache_of_gaussian_attention_is_half_of_softmax() -> None:
    gaussian, softmax = costs("gka-d20"), costs("nanochat-d20")
    assert gaussian.cache_bytes_per_token == 20 * 1280 * 2
    assert softmax.cache_bytes_per_token == 2 * gaussian.cache_bytes_per_token
    assert gaussian.constant_state_bytes == softmax.constant_state_bytes == 0


def test_a_k_stack_keeps_its_state_whatever_the_length() -> None:
    found = costs("k-operators-local-shakespeare")
    assert found.cache_bytes_per_token == 0
    # 6 layers of S (4, 64) and the last 7 inputs, at 2 bytes.
    assert found.constant_state_bytes == 6 * (4 * 64 + 7 * 64) * 2
