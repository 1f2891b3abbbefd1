"""The recall task: what models remember beyond the window of their layers, with fast weights and without.

Every arm has the same blocks, width and depth around its mixer. Where arms with fast weights are asked for, the others
get a wider feed-forward layer, so that they have as many parameters. Mixers that have a window see `window` positions
in every layer, which two layers make 2 (window - 1) before a position; the nearest pair lies farther.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kmixer.data.recall import Asked, Recall, make_recall
from kmixer.errors import InputError
from kmixer.experiments.descent import descend
from kmixer.experiments.rows import AtDistance, RecallingArm, RecallTrainings, TrainedRecall
from kmixer.experiments.statistics import paired_difference, summarize
from kmixer.files import read_json, write_json
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

    @property
    def accuracy(self) -> float:
        return float(self.right.double().mean())


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


class Trainings:
    """What was trained already, in a file where there is one.

    Args:
        path: of the file; made with the first training. None keeps nothing.
        setting: of all of them.
        matched: whether arms without fast weights have the parameters of those with them.

    Raises:
        InputError: the file is no such file, or holds trainings of another setting.
    """

    def __init__(self, path: Path | None, setting: Setting, *, matched: bool) -> None:
        self._path = path
        asked = {**asdict(setting), "gaps": list(setting.gaps), "matched": matched}
        self._content = RecallTrainings(setting=asked, trained=[])
        if path is not None and path.exists():
            self._content = RecallTrainings.parse(read_json(path), source=str(path))
        kept = self._content.setting
        differs = [
            f"{key} is {kept.get(key)} there and {new} now" for key, new in asked.items() if kept.get(key) != new
        ]
        if differs:
            said = ", ".join(differs)
            raise InputError(f"{path} holds trainings of another setting: {said}; give its setting, or another --out")

    def get(self, pairs: int, arm: str, seed: int) -> TrainedRecall | None:
        asked = (pairs, arm, seed)
        return next((one for one in self._content.trained if (one.pairs, one.arm, one.seed) == asked), None)

    def add(self, trained: TrainedRecall) -> None:
        self._content.trained.append(trained)
        if self._path is not None:
            write_json(self._path, self._content.model_dump())


def run_recall(
    arms: list[Arm],
    tasks: list[Recall],
    seeds: list[int],
    setting: Setting,
    report: Callable[[TrainedRecall], None],
    out: Path | None = None,
) -> list[RecallingArm]:
    """Train every arm on every task with every seed; a row per task and arm.

    Validation sequences are the same for all; a seed gives weights and training sequences, these the same for every
    arm. What is reported is what the last step left, not the best of several looks. Differences in accuracy are from
    the arm before without fast weights, paired by seed. What has ended is kept in the file `out` and not trained again.

    Raises:
        InputError: a task whose nearest pair the layers with a window could see, or a file of other trainings.
    """
    for task in tasks:
        nearest = min([task.gap, *setting.gaps]) + 1
        if nearest <= setting.reach:
            raise InputError(
                f"gap: got {nearest - 1}; allowed: {setting.reach} or more, as {setting.layers} layers with a window "
                f"of {setting.window} see so many positions back"
            )
    matched = any(arm.fast for arm in arms)
    trainings = Trainings(out, setting, matched=matched)
    rows = []
    for task in tasks:
        baseline: dict[int, float] = {}
        for arm in arms:
            config = config_of(arm, setting, task.vocabulary, matched=matched)
            trained: list[TrainedRecall] = []
            for seed in seeds:
                one = trainings.get(task.pairs, arm.name, seed)
                if one is None:
                    one = _train(config, task, arm, setting, seed)
                    trainings.add(one)
                trained.append(one)
                report(one)
            accuracies = {one.seed: one.accuracy for one in trained}
            difference = paired_difference(accuracies, baseline) if arm.fast else None
            baseline = baseline if arm.fast else accuracies
            loss, accuracy = summarize([one.loss for one in trained]), summarize([*accuracies.values()])
            rows.append(
                RecallingArm(
                    arm=arm.name,
                    mixer=arm.mixer,
                    fast_weights=arm.fast,
                    pairs=task.pairs,
                    keys=task.keys,
                    length=task.length,
                    parameters=trained[0].parameters,
                    steps=setting.steps,
                    n=len(seeds),
                    seeds=seeds,
                    loss=loss.mean,
                    loss_deviation=loss.deviation,
                    accuracy=accuracy.mean,
                    accuracy_deviation=accuracy.deviation,
                    accuracies=[*accuracies.values()],
                    chance=task.chance,
                    reached=[one.reached for one in trained],
                    difference=None if difference is None else difference.mean,
                    interval=None if difference is None else difference.interval,
                    by_distance=_over_seeds([one.by_distance for one in trained]),
                )
            )
    return rows


def _train(config: TransformerConfig, task: Recall, arm: Arm, setting: Setting, seed: int) -> TrainedRecall:
    began = time.perf_counter()
    torch.manual_seed(seed)
    model = CausalLM(config, task.vocabulary)
    generator = torch.Generator().manual_seed(seed)
    validation = make_recall(task, setting.validation, torch.Generator().manual_seed(VALIDATION_SEED))
    reached, score = None, None

    def loss() -> Tensor:
        return _measure(model, make_recall(task, setting.batch_size, generator))[0]

    for step in descend(model.parameters(), loss, setting):
        if step % setting.evaluate_every == 0 or step == setting.steps:
            score = _score(model, validation)
            if reached is None and score.accuracy >= RECALLED:
                reached = step
    assert score is not None
    by_distance = _by_distance(task.gap, score, validation)
    for gap in setting.gaps:
        farther = make_recall(task.with_gap(gap), setting.validation, torch.Generator().manual_seed(VALIDATION_SEED))
        by_distance += _by_distance(gap, _score(model, farther), farther)
    return TrainedRecall(
        pairs=task.pairs,
        arm=arm.name,
        seed=seed,
        parameters=size_of(model),
        loss=score.loss,
        accuracy=score.accuracy,
        reached=reached,
        by_distance=by_distance,
        seconds=time.perf_counter() - began,
    )


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


def _by_distance(gap: int, score: Score, asked: Asked) -> list[AtDistance]:
    """Accuracy by bucket of distances."""
    buckets = asked.distances // BUCKET
    return [
        AtDistance(
            gap=gap,
            nearest=bucket * BUCKET,
            farthest=(bucket + 1) * BUCKET - 1,
            asked=int((buckets == bucket).sum()),
            accuracy=float(score.right[buckets == bucket].double().mean()),
        )
        for bucket in buckets.unique().tolist()
    ]


def _over_seeds(of_seeds: list[list[AtDistance]]) -> list[AtDistance]:
    """Means over seeds, which were all asked the same."""
    return [
        same_asked[0].model_copy(update={"accuracy": statistics.fmean(at.accuracy for at in same_asked)})
        for same_asked in zip(*of_seeds, strict=True)
    ]
