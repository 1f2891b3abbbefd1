"""The recall task: what models remember beyond the window of their layers, with fast weights and without.

Every arm has the same blocks, width and depth around its mixer. Where arms with fast weights are asked for, the others
get a wider feed-forward layer, so that they have as many parameters. Mixers that have a window see `window` positions
in every layer, which two layers make 2 (window - 1) before a position; the nearest pair lies farther.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kmixer.data.recall import Asked, Recall, make_recall
from kmixer.errors import InputError
from kmixer.experiments.descent import descend
from kmixer.experiments.rows import AtDistance, RecallingArm
from kmixer.experiments.statistics import paired_difference, summarize
from kmixer.models.causal_lm import CausalLM
from kmixer.models.matched import size_of
from kmixer.models.mixers.registry import BASELINE, CARDS
from kmixer.models.transformer import HIDDEN_MULTIPLE, TransformerConfig

VALIDATION_SEED = 1 << 20
# Positions of a bucket of distances.
BUCKET = 16
# The accuracy that counts as recalled.
RECALLED = 0.99
CEILING = "full attention"


@dataclass(frozen=True)
class Setting:
    """How arms are built and trained. AdamW without a schedule, clipped at 1; fresh sequences in every step."""

    steps: int = 200
    batch_size: int = 64
    learning_rate: float = 3e-3
    weight_decay: float = 0.01
    evaluate_every: int = 20
    validation: int = 256  # sequences of an evaluation
    gaps: tuple[int, ...] = ()  # further gaps that the trained models are measured at
    width: int = 64
    hidden_width: int = 128
    layers: int = 2
    heads: int = 4
    window: int = 16
    chunk: int = 16
    rate: float = 0.2
    init: str = "next"

    @property
    def reach(self) -> int:
        """How far back all layers with a window see together."""
        return self.layers * (self.window - 1)


class Arm(NamedTuple):
    """A model of the comparison."""

    name: str
    mixer: str
    windowed: bool
    fast: bool


class Score(NamedTuple):
    """Over all asked values: mean cross-entropy in nats, whether each was right (n, p)."""

    loss: float
    right: Tensor


class Trained(NamedTuple):
    """What a model did after its last step, and after how many steps it first recalled; None where it never did."""

    score: Score
    at_gaps: list[tuple[int, Score, Asked]]
    reached: int | None


def arms_of(mixers: list[str], *, fast: bool) -> list[Arm]:
    """Every mixer without fast weights and, where asked, with them; full attention, the ceiling, at the end."""
    arms = []
    for mixer in mixers:
        windowed = CARDS[mixer].has_window
        name = f"{mixer}, window" if windowed else mixer
        arms += [Arm(name, mixer, windowed, fast=False)]
        arms += [Arm(f"{name} + fast weights", mixer, windowed, fast=True)] if fast else []
    return [*arms, Arm(CEILING, BASELINE, windowed=False, fast=False)]


def config_of(arm: Arm, setting: Setting, vocabulary: int, *, matched: bool) -> TransformerConfig:
    """The model of an arm; `matched` widens one without fast weights until it has the parameters of one with them."""
    config = _config(arm, setting, setting.hidden_width)
    if arm.fast or not matched:
        return config
    with torch.device("meta"):
        target = size_of(CausalLM(_config(arm._replace(fast=True), setting, setting.hidden_width), vocabulary))
        steps = range(setting.hidden_width, 2 * setting.hidden_width + 8 * setting.width, HIDDEN_MULTIPLE)
        sizes = {hidden: size_of(CausalLM(_config(arm, setting, hidden), vocabulary)) for hidden in steps}
    return _config(arm, setting, min(sizes, key=lambda hidden: abs(sizes[hidden] - target)))


def _config(arm: Arm, setting: Setting, hidden_width: int) -> TransformerConfig:
    fast: dict[str, Any] = {"layers": "every", "chunk": setting.chunk, "rate": setting.rate, "init": setting.init}
    values = {
        "width": setting.width,
        "layers": setting.layers,
        "heads": setting.heads,
        "mixers": arm.mixer,
        "mlp_multiplier": hidden_width / setting.width,
        "windows": "S" if arm.windowed else "L",
        "window": setting.window if arm.windowed else None,
        "fast_weights": fast if arm.fast else None,
    }
    return TransformerConfig.parse(values, source=f"task recall, {arm.name}")


def run_recall(
    arms: list[Arm],
    tasks: list[Recall],
    seeds: list[int],
    setting: Setting,
    report: Callable[[Recall, Arm, int, Trained], None],
) -> list[RecallingArm]:
    """Train every arm on every task with every seed; a row per task and arm.

    Validation sequences are the same for all; a seed gives weights and training sequences, these the same for every
    arm. What is reported is what the last step left, not the best of several looks. Differences in accuracy are from
    the arm before without fast weights, paired by seed.

    Raises:
        InputError: a task whose nearest pair the layers with a window could see.
    """
    for task in tasks:
        nearest = min([task.gap, *setting.gaps]) + 1
        if nearest <= setting.reach:
            raise InputError(
                f"gap: got {nearest - 1}; allowed: {setting.reach} or more, as {setting.layers} layers with a window "
                f"of {setting.window} see so many positions back"
            )
    matched = any(arm.fast for arm in arms)
    rows = []
    for task in tasks:
        baseline: dict[int, float] = {}
        for arm in arms:
            config = config_of(arm, setting, task.vocabulary, matched=matched)
            trained: dict[int, Trained] = {}
            parameters = 0
            for seed in seeds:
                torch.manual_seed(seed)
                model = CausalLM(config, task.vocabulary)
                parameters = size_of(model)
                trained[seed] = _train(model, task, setting, seed)
                report(task, arm, seed, trained[seed])
            accuracies = {seed: float(one.score.right.double().mean()) for seed, one in trained.items()}
            difference = paired_difference(accuracies, baseline) if arm.fast else None
            baseline = baseline if arm.fast else accuracies
            loss, accuracy = summarize([one.score.loss for one in trained.values()]), summarize([*accuracies.values()])
            rows.append(
                RecallingArm(
                    arm=arm.name,
                    mixer=arm.mixer,
                    fast_weights=arm.fast,
                    pairs=task.pairs,
                    keys=task.keys,
                    length=task.length,
                    parameters=parameters,
                    steps=setting.steps,
                    n=len(seeds),
                    seeds=seeds,
                    loss=loss.mean,
                    loss_deviation=loss.deviation,
                    accuracy=accuracy.mean,
                    accuracy_deviation=accuracy.deviation,
                    accuracies=[*accuracies.values()],
                    chance=task.chance,
                    reached=[one.reached for one in trained.values()],
                    difference=None if difference is None else difference.mean,
                    interval=None if difference is None else difference.interval,
                    by_distance=_by_distance([*trained.values()]),
                )
            )
    return rows


def _train(model: CausalLM, task: Recall, setting: Setting, seed: int) -> Trained:
    generator = torch.Generator().manual_seed(seed)
    validation = make_recall(task, setting.validation, torch.Generator().manual_seed(VALIDATION_SEED))
    reached, score = None, None

    def loss() -> Tensor:
        return _measure(model, make_recall(task, setting.batch_size, generator))[0]

    for step in descend(model.parameters(), loss, setting):
        if step % setting.evaluate_every == 0 or step == setting.steps:
            score = _score(model, validation)
            if reached is None and float(score.right.double().mean()) >= RECALLED:
                reached = step
    assert score is not None
    at_gaps = [(task.gap, score, validation)]
    for gap in setting.gaps:
        farther = make_recall(task.with_gap(gap), setting.validation, torch.Generator().manual_seed(VALIDATION_SEED))
        at_gaps.append((gap, _score(model, farther), farther))
    return Trained(score, at_gaps, reached)


@torch.no_grad()
def _score(model: CausalLM, asked: Asked) -> Score:
    parts = [_measure(model, Asked(*chunk)) for chunk in zip(*(part.split(64) for part in asked), strict=True)]
    right = torch.cat([part for _, part in parts])
    weights = [len(part) / len(right) for _, part in parts]
    return Score(sum(weight * float(loss) for weight, (loss, _) in zip(weights, parts, strict=True)), right)


def _measure(model: CausalLM, asked: Asked) -> tuple[Tensor, Tensor]:
    """Cross-entropy in nats over the asked values, and whether each is the likeliest token (n, p)."""
    logits = model(asked.tokens).logits
    assert logits is not None
    answers = logits.gather(1, asked.places[:, :, None].expand(-1, -1, logits.shape[2]))
    return F.cross_entropy(answers.flatten(0, 1), asked.values.flatten()), answers.argmax(-1) == asked.values


def _by_distance(trained: list[Trained]) -> list[AtDistance]:
    """Accuracy by gap and by bucket of distances, over all seeds."""
    measured = []
    for index, (gap, _, asked) in enumerate(trained[0].at_gaps):
        right = torch.stack([one.at_gaps[index][1].right for one in trained]).double().mean(0)
        buckets = asked.distances // BUCKET
        for bucket in buckets.unique().tolist():
            chosen = buckets == bucket
            measured.append(
                AtDistance(
                    gap=gap,
                    nearest=bucket * BUCKET,
                    farthest=(bucket + 1) * BUCKET - 1,
                    asked=int(chosen.sum()),
                    accuracy=float(right[chosen].mean()),
                )
            )
    return measured
