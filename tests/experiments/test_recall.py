"""The recall task: arms of equal size, causal, repeatable, and what a window cannot see is not recalled."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from kmixer.analysis.recall import draw_recall
from kmixer.data.recall import Recall, make_recall
from kmixer.errors import InputError
from kmixer.experiments.recall import CEILING, Setting, arms_of, config_of, run_recall
from kmixer.experiments.rows import TrainedRecall
from kmixer.models.causal_lm import CausalLM
from kmixer.models.matched import size_of
from kmixer.models.mixers.registry import CARDS, CAUSAL_NAMES

TASK = Recall(4, 8, 96)
SMALL = Setting(
    steps=6, batch_size=4, validation=8, evaluate_every=3, width=16, hidden_width=32, heads=2, gaps=(32, 96)
)
SHARED = 0.02  # part of its parameters by which an arm may differ: hidden units come in eights


@pytest.mark.parametrize("pairs", [8, 64])
@pytest.mark.parametrize("mixer", CAUSAL_NAMES)
def test_arms_of_a_mixer_have_equal_parameters(mixer: str, pairs: int) -> None:
    plain, fast, ceiling = arms_of([mixer], fast=True)
    vocabulary = Recall(pairs, pairs, 4 * pairs, gap=0).vocabulary
    sizes = {
        arm: size_of(CausalLM(config_of(arm, Setting(), vocabulary, matched=True), vocabulary))
        for arm in (plain, fast, ceiling)
    }
    assert abs(sizes[plain] - sizes[fast]) < SHARED * sizes[fast]
    assert ceiling.name == CEILING
    assert config_of(fast, Setting(), vocabulary, matched=True).hidden_width == Setting.hidden_width
    alone = arms_of([mixer], fast=False)
    assert [arm.fast for arm in alone] == [False, False]
    assert config_of(alone[0], Setting(), vocabulary, matched=False).hidden_width == Setting.hidden_width


@torch.no_grad()
def test_a_window_sees_no_shown_pair_and_fast_weights_do() -> None:
    """Through the layers with a window no logit of the asked part depends on any shown pair: chance by construction."""
    torch.manual_seed(0)
    asked = make_recall(TASK, 3, torch.Generator().manual_seed(0))
    changed = asked.tokens.clone()
    changed[:, : asked.places[0, 0] - TASK.gap] = 0
    windowed = [arm for arm in arms_of([name for name in CARDS if CARDS[name].has_window], fast=True) if arm.windowed]
    assert windowed
    for arm in windowed:
        model = CausalLM(config_of(arm, Setting(), TASK.vocabulary, matched=True), TASK.vocabulary).double().eval()
        first, second = (model(tokens).logits[:, asked.places[0, 0] :] for tokens in (asked.tokens, changed))
        # Gaussian attention rounds in sums over blocks that begin before the window.
        assert bool(((first - second).abs() > 1e-9).any()) == arm.fast, arm.name


def test_runs_repeat_and_say_what_they_are() -> None:
    arms = arms_of([*CARDS][:1], fast=True)
    seen: list[tuple[str, int]] = []
    rows = run_recall(arms, [TASK], [0, 1], SMALL, lambda one: seen.append((one.arm, one.seed)))
    assert seen == [(arm.name, seed) for arm in arms for seed in (0, 1)]
    assert run_recall(arms, [TASK], [0, 1], SMALL, lambda *_: None) == rows
    for row, arm in zip(rows, arms, strict=True):
        assert (row.arm, row.fast_weights, row.n, row.steps, row.chance) == (arm.name, arm.fast, 2, 6, 1 / 8)
        assert (row.difference is None) == (not arm.fast)
        assert row.accuracy == pytest.approx(sum(row.accuracies) / 2)
        for gap in (TASK.gap, *SMALL.gaps):
            at_gap = [at for at in row.by_distance if at.gap == gap]
            assert sum(at.asked for at in at_gap) == SMALL.validation * TASK.pairs
            assert all(at.farthest > gap for at in at_gap)
        trained_at = [at for at in row.by_distance if at.gap == TASK.gap]
        recalled = sum(at.asked * at.accuracy for at in trained_at) / (SMALL.validation * TASK.pairs)
        assert recalled == pytest.approx(row.accuracy)
    assert rows[1].difference == pytest.approx(rows[1].accuracy - rows[0].accuracy)


def test_what_was_trained_is_kept_and_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arms, out = arms_of([*CARDS][:1], fast=True), tmp_path / "recall.json"
    rows = run_recall(arms, [TASK], [0, 1], SMALL, lambda _: None)
    ended: list[TrainedRecall] = []

    def stop(one: TrainedRecall) -> None:
        ended.append(one)
        if len(ended) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_recall(arms, [TASK], [0, 1], SMALL, stop, out)
    seen: list[TrainedRecall] = []
    assert run_recall(arms, [TASK], [0, 1], SMALL, seen.append, out) == rows
    assert seen[:3] == ended
    monkeypatch.setattr("kmixer.experiments.recall._train", lambda *_: pytest.fail("trained again"))
    assert run_recall(arms, [TASK], [0, 1], SMALL, lambda _: None, out) == rows
    with pytest.raises(InputError, match=r"steps is 6 there and 7 now; give its setting, or another --out$"):
        run_recall(arms, [TASK], [0], dataclasses.replace(SMALL, steps=7), lambda _: None, out)
    with pytest.raises(InputError, match="matched is True there and False now"):
        run_recall(arms_of([*CARDS][:1], fast=False), [TASK], [0], SMALL, lambda _: None, out)
    out.write_text('{"setting": {}}')
    with pytest.raises(InputError, match=r"recall.json: trained: .*missing|recall.json.*trained"):
        run_recall(arms, [TASK], [0], SMALL, lambda _: None, out)


def test_a_pair_within_the_reach_of_the_window_is_refused() -> None:
    assert SMALL.reach == 30
    for task, setting in ((TASK.with_gap(29), SMALL), (TASK, dataclasses.replace(SMALL, gaps=(29,)))):
        with pytest.raises(InputError, match="gap: got 29; allowed: 30 or more"):
            run_recall(arms_of([*CARDS][:1], fast=False), [task], [0], setting, lambda *_: None)


def test_the_figure_has_a_curve_per_arm() -> None:
    tasks = [TASK, Recall(2, 8, 96)]
    setting = dataclasses.replace(SMALL, steps=1, gaps=())
    rows = run_recall(arms_of([*CARDS][:1], fast=True), tasks, [0], setting, lambda *_: None)
    figure = draw_recall(rows, setting.reach)
    for axes, task in zip(figure.axes, tasks, strict=True):
        curves = [line for line in axes.lines if not str(line.get_label()).startswith("_")]
        chosen = [row for row in rows if row.pairs == task.pairs]
        assert [line.get_label() for line in curves] == [row.arm for row in chosen]
        for line, row in zip(curves, chosen, strict=True):
            assert list(line.get_ydata()) == [at.accuracy for at in row.by_distance]
