"""The operator by backend: equal to the definition before it is timed, ratios of what was timed."""

from __future__ import annotations

import pytest

from kmixer.bench import op
from kmixer.bench.measure import Timing
from kmixer.bench.op import bench_op, usable_backends
from kmixer.ops.decay import recurrence

SHAPE = (3, 8, 20, 2)  # r, d, t, b


def test_ratios_are_those_of_the_times(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([1.0, 6.0, 0.5, 2.0])  # forward and training of mask, then of block
    monkeypatch.setattr(op, "time_calls", lambda call, repeats: Timing(9.0, next(seconds)))
    mask, block = bench_op(*SHAPE, ["mask", "block"], 1, flops=6 * 3 * 8 * 100.0)
    assert (mask.times_faster_than_mask, block.times_faster_than_mask) == (1.0, 3.0)
    assert (mask.forward_seconds, mask.training_seconds, mask.first_call_seconds) == (1.0, 6.0, 9.0)
    assert block.forward_tokens_per_second == 2 * 20 / 0.5
    # At 6 operations a state element, such a machine makes 100 tokens per second.
    assert block.part_of_fused_bound == pytest.approx(0.8)
    assert (block.r, block.d, block.t, block.b) == SHAPE
    assert max(mask.relative_error, block.relative_error) < 1e-5


def test_without_mask_there_is_no_ratio_to_it() -> None:
    (block,) = bench_op(*SHAPE, ["block"], 1, 1e9)
    assert block.times_faster_than_mask is None
    assert "times_faster_than_mask" not in block.to_json()
    assert block.to_json()["backend"] == "block"


def test_a_backend_that_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = []
    monkeypatch.setitem(recurrence._IMPLEMENTATIONS, "mask", lambda q, k, v, log_decay, state: (v, state))
    monkeypatch.setattr(op, "time_calls", lambda call, repeats: timed.append(call) or Timing(1.0, 1.0))
    with pytest.raises(RuntimeError, match="backend mask differs from the definition"):
        bench_op(*SHAPE, ["mask"], 1, 1e9)
    assert not timed


def test_a_shape_too_large_for_mask_leaves_it_out() -> None:
    assert "mask" in usable_backends(4, 8, 16, 1)
    assert "mask" not in usable_backends(128, 512, 4096, 1)
    assert "auto" not in usable_backends(4, 8, 16, 1)
