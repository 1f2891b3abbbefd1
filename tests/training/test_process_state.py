"""What a process had before training it has afterwards."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kmixer.errors import DivergedError, InputError
from kmixer.training.loop import train
from tests.training.test_loop import CrashError, StopAfter, make_recipe, recipe_without_a_finite_loss


def settings() -> dict[str, Any]:
    """Everything of torch and the process that training might change."""
    return {
        "random": torch.random.get_rng_state().tolist(),
        "matmul": torch.get_float32_matmul_precision(),
        "mkldnn": torch.backends.mkldnn.matmul.fp32_precision,
        "cuda": torch.backends.cuda.matmul.fp32_precision,
        "all": torch.backends.fp32_precision,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "filled": torch.utils.deterministic.fill_uninitialized_memory,
        "benchmark": torch.backends.cudnn.benchmark,
        "gradients": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)],
    }


def test_training_leaves_torch_as_it_was(text_file: Path, tmp_path: Path) -> None:
    torch.manual_seed(12345)
    before = settings()
    train(make_recipe(text_file), tmp_path / "run")
    assert settings() == before
    train(make_recipe(text_file), tmp_path / "run", resume=True)
    assert settings() == before


@pytest.mark.parametrize(
    ("error", "fail"),
    [
        (CrashError, lambda text, out: train(make_recipe(text), out, reporter=StopAfter(2))),
        (DivergedError, lambda text, out: train(recipe_without_a_finite_loss(text), out)),
        (InputError, lambda text, out: train(make_recipe(text, window=30000), out)),
    ],
)
def test_training_that_fails_does_too(
    error: type[Exception], fail: Callable[[Path, Path], object], text_file: Path, tmp_path: Path
) -> None:
    torch.manual_seed(54321)
    before = settings()
    with pytest.raises(error):
        fail(text_file, tmp_path / "run")
    assert settings() == before
    assert not list(tmp_path.glob(".*"))
