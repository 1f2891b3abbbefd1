"""Fast float32 products: only where they are exact, and only within the context."""

from __future__ import annotations

import pytest
import torch

from kmixer.training import matmul_precision
from kmixer.training.matmul_precision import EXACT, fast_exact_matmuls, slower_in_bfloat16

CPU = torch.device("cpu")


def relative_error() -> float:
    a, b = (torch.randn(300, 300, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    exact = a.double() @ b.double()
    return float((a @ b - exact).abs().max() / exact.abs().max())


def test_products_within_it_are_exact() -> None:
    with fast_exact_matmuls(CPU):
        assert relative_error() < EXACT


@pytest.mark.parametrize(("exact", "within"), [(True, "medium"), (False, "highest")])
def test_the_probe_decides_and_the_setting_is_restored(
    exact: bool, within: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matmul_precision, "_is_exact", lambda precision: exact)
    with pytest.raises(KeyError), fast_exact_matmuls(CPU):
        assert torch.get_float32_matmul_precision() == within
        raise KeyError
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_gpu_and_a_choice_of_the_user_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul_precision, "_is_exact", lambda precision: True)
    with fast_exact_matmuls(torch.device("cuda")):
        assert torch.get_float32_matmul_precision() == "highest"
    torch.set_float32_matmul_precision("high")
    try:
        with fast_exact_matmuls(CPU):
            assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_the_probe_finds_the_default_exact_and_restores_the_setting() -> None:
    assert matmul_precision._is_exact("highest")
    matmul_precision._is_exact("medium")
    assert torch.get_float32_matmul_precision() == "highest"


def test_slow_products_of_bfloat16_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {torch.float32: 2.0, torch.bfloat16: 9.0}
    monkeypatch.setattr(matmul_precision, "_seconds", lambda a, b: seconds[a.dtype])
    assert slower_in_bfloat16(CPU) == 4.5
    assert slower_in_bfloat16(torch.device("cuda")) is None
    seconds[torch.bfloat16] = 1.0
    assert slower_in_bfloat16(CPU) is None
