"""What `kmixer lab geometry` measures: how far perturbed inputs move representations, of runs and by head."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kmixer.analysis.lab_inputs import Asked, OfModel, windows
from kmixer.analysis.lab_models import initialisations
from kmixer.data.token_files import Dataset
from kmixer.errors import InputError
from kmixer.experiments.geometry import HEADS, Arms, Pool, Setting, pooled, run_ablation
from kmixer.experiments.statistics import paired_difference
from kmixer.language_model import load
from kmixer.measure.evaluating import eagerly
from kmixer.measure.geometry import DIRECTIONS, INPUTS_OF_A_CHANNEL, chance_distance, distance_error, measure_moves
from kmixer.measure.locality import inputs_of
from kmixer.measure.signal import blocks_of, stream_of
from kmixer.measure.texts import own_text
from kmixer.models.causal_lm import CausalLM
from kmixer.models.k_stack import ModelConfig
from kmixer.models.model_folder import find_model_folder, read_config
from kmixer.models.transformer import TransformerConfig
from kmixer.runs.lab import identity_of
from kmixer.runs.lab_geometry import HeadArm
from kmixer.runs.recipe import LanguageRecipe
from kmixer.runs.run_folder import RunFolder

WINDOWS_AT_ONCE = 32
Told = Callable[[str], None]


@dataclass(frozen=True)
class Perturbing:
    """What to do to the windows of a run, and where to look."""

    rates: tuple[float, ...] = (0.01, 0.05, 0.1)  # of tokens replaced
    reverse: bool = False  # windows read backwards too
    pool: Pool = "mean"
    layer: int | None = None  # the stream after so many blocks; None: what the head reads
    windows: int | None = None  # None: as many as the width asks for, as far as the text goes
    window: int = 64
    initialisations: int = 2  # fresh encoders beside it
    seed: int = 0

    @property
    def names(self) -> list[str]:
        return [f"{100 * rate:g} %" for rate in self.rates] + ["reversed"] * self.reverse


def geometry_of_heads(arms: Arms, setting: Setting, told: Told) -> dict[str, Any]:
    """Train and measure the ablation of heads; `told` is given a line for every encoder, with the time that is left."""
    began, done = time.monotonic(), 0

    def report(arm: HeadArm) -> None:
        nonlocal done
        done += 1
        left = (time.monotonic() - began) / done * (arms.number - done)
        told(
            f"{done}/{arms.number}: {arm.system}, {arm.mixer}, {arm.head}, {arm.codes} codes, seed {arm.seed}: "
            f"next value off by {arm.next_value:.4f}; {_minutes(left)} left"
        )

    measured = run_ablation(arms, setting, report)
    return {
        "name": "ablation of heads",
        "trained": True,
        "positions": setting.length,
        "steps": setting.steps,
        "width": setting.width,
        "inputs": setting.inputs,
        "pool": setting.pool,
        "rates": list(setting.rates),
        "directions": setting.directions,
        "learned": setting.learned,
        "comparisons": compare_heads(measured, middle(setting.rates)),
        "arms": [arm.model_dump() for arm in measured],
    }


def middle(rates: Sequence[float]) -> int:
    """Which of the rates stands for all where there is room for one."""
    return len(rates) // 2


def compare_heads(arms: list[HeadArm], rate: int) -> list[dict[str, Any]]:
    """Of every encoder, at one of the rates of noise, what training and the head make of D, paired by seed.

    "from_untrained": D less that before training, by head; "heads": "distance", D of cross-entropy less that of squared
    error, and ratios by seed, and "shared", the same of D_k; None where only one was trained.
    """
    compared = []
    for names in dict.fromkeys((arm.system, arm.mixer, arm.codes) for arm in arms):
        group = [arm for arm in arms if (arm.system, arm.mixer, arm.codes) == names]
        by_head = {head: {arm.seed: arm for arm in group if arm.head == head} for head in HEADS}
        compared.append(
            {
                "system": names[0],
                "mixer": names[1],
                "codes": names[2],
                "from_untrained": {
                    head: _difference(
                        _by_seed(its, "distance", rate),
                        {seed: arm.untrained.distance[rate] for seed, arm in its.items()},
                    )
                    for head, its in by_head.items()
                    if its
                },
                "heads": _against(by_head["ce"], by_head["mse"], rate),
            }
        )
    return compared


def _by_seed(arms: dict[int, HeadArm], measure: str, rate: int) -> dict[int, float]:
    return {seed: getattr(arm.trained, measure)[rate] for seed, arm in arms.items()}


def _difference(values: dict[int, float], baseline: dict[int, float]) -> dict[str, Any] | None:
    difference = paired_difference(values, baseline)
    return None if difference is None else {"difference": difference.mean, "interval": difference.interval}


def _against(first: dict[int, HeadArm], second: dict[int, HeadArm], rate: int) -> dict[str, Any] | None:
    """Two heads of one encoder, seed by seed, by D and by D_k."""
    if not first.keys() & second.keys():
        return None
    compared: dict[str, Any] = {}
    for measure in ("distance", "shared"):
        values, others = _by_seed(first, measure, rate), _by_seed(second, measure, rate)
        ratios = [values[seed] / others[seed] if others[seed] > 0 else None for seed in sorted(values)]
        compared[measure] = {"ratios": ratios, **(_difference(values, others) or {})}
    return compared


def geometry_of_runs(
    targets: list[Path], asked: Perturbing, corpus: str | None, data_dir: Path | None, told: Told
) -> dict[str, Any]:
    """Perturb the validation text of runs, and see how far the representations of their best weights move.

    Raises InputError where there is no text, for fewer windows than channels, and for a layer that is not there.
    """
    subjects = [_Subject(target, corpus, data_dir) for target in targets]
    width = max(subject.model.config.width for subject in subjects)
    directions = min(DIRECTIONS, *(subject.model.config.width for subject in subjects))
    number = min(_number_of_windows(subject, asked, width) for subject in subjects)
    if number < INPUTS_OF_A_CHANNEL * width:
        told(
            f"warning: {number:,} windows for a width of {width}: with fewer than {INPUTS_OF_A_CHANNEL} for a channel "
            f"D of unrelated inputs is well below 1, about {chance_distance(number, width):.2f}: see its null"
        )
    for subject in subjects:
        blocks = len(blocks_of(subject.model))
        if asked.layer is not None and asked.layer > blocks:
            raise InputError(f"--layer: got {asked.layer}; allowed: 0 to {blocks}, the blocks of {subject.run.path}")
    passes = len(subjects) * (1 + asked.initialisations) * (1 + len(asked.names))
    clock = _Clock(passes, told)
    curves = [subject.measure(asked, number, directions, clock) for subject in subjects]
    known = identity_of(subjects[0].run) if len(subjects) == 1 else {}
    return {
        "name": ", ".join(subject.run.path.name for subject in subjects),
        "trained": True,
        "positions": asked.window,
        "windows": number,
        "pool": asked.pool,
        "layer": asked.layer,
        "seed": asked.seed,
        "directions": directions,
        "perturbations": asked.names,
        "curves": curves,
        **known,
    }


class _Clock:
    """Says after the first pass how long all of them will take."""

    def __init__(self, passes: int, told: Told) -> None:
        self.passes, self.told, self.began, self.done = passes, told, time.monotonic(), 0

    def tick(self) -> None:
        self.done += 1
        if self.done == 1 and self.passes > 1:
            left = (time.monotonic() - self.began) * (self.passes - 1)
            self.told(f"{self.passes} passes over the windows, {_minutes(left)}")


def _minutes(seconds: float) -> str:
    return f"about {math.ceil(seconds)} s" if seconds < 90 else f"about {math.ceil(seconds / 60)} minutes"


class _Subject:
    """A run: its best weights, its text, and fresh encoders like it."""

    recipe: LanguageRecipe
    dataset: Dataset

    def __init__(self, target: Path, corpus: str | None, data_dir: Path | None) -> None:
        self.run = RunFolder(target)
        folder = find_model_folder(target)
        if not isinstance(read_config(folder).model, ModelConfig | TransformerConfig):
            raise InputError(f"{target} is a classifier; kmixer lab geometry perturbs the text of language models")
        if not self.run.exists():
            raise InputError(f"{target} is a model without its run, so without data")
        model = load(target)
        assert model.tokenizer is not None
        self.model: CausalLM = model
        self.recipe, self.dataset = own_text(self.run, model.tokenizer, corpus, data_dir)

    def measure(self, asked: Perturbing, number: int, directions: int, clock: _Clock) -> dict[str, Any]:
        chosen = Asked(asked.initialisations, number, window=asked.window, seed=asked.seed)
        clean = windows(self.dataset.validation.tokens, chosen)
        perturbed = self._perturb(clean, asked)

        def moved(model: CausalLM) -> tuple[Tensor, list[Tensor]]:
            of_each = []
            for tokens in (clean, *perturbed):
                of_each.append(_representation(model, tokens, asked))
                clock.tick()
            return of_each[0], of_each[1:]

        own, others = moved(self.model)
        source = OfModel(self.model, clean[:WINDOWS_AT_ONCE])
        fresh = [moved(model) for model in initialisations(self.recipe, source, chosen) if isinstance(model, CausalLM)]
        return {
            "name": self.run.path.name,
            "width": self.model.config.width,
            "changed": [float((other != clean).double().mean()) for other in perturbed],
            "trained": measure_moves(own, others, directions=directions, seed=asked.seed),
            "distance_error": [distance_error(own, other) for other in others],
            "untrained": [measure_moves(*one, directions=directions, seed=asked.seed) for one in fresh],
        }

    def _perturb(self, clean: Tensor, asked: Perturbing) -> list[Tensor]:
        counts = torch.bincount(self.dataset.train.tokens.long(), minlength=self.model.vocabulary_size)
        perturbed = [replaced_tokens(clean, counts, rate, asked.seed) for rate in asked.rates]
        return [*perturbed, clean.flip(1)] if asked.reverse else perturbed


def replaced_tokens(clean: Tensor, counts: Tensor, rate: float, seed: int) -> Tensor:
    """Windows (b, n) with draws from counts (v,) at a share of the positions; a higher rate has those of a lower."""
    generator = torch.Generator().manual_seed(seed)
    chance = torch.rand(clean.shape, generator=generator, dtype=torch.float64)
    drawn = torch.multinomial(counts.double(), clean.numel(), replacement=True, generator=generator)
    return torch.where(chance < rate, drawn.view_as(clean), clean)


def _number_of_windows(subject: _Subject, asked: Perturbing, width: int) -> int:
    tokens = len(subject.dataset.validation.tokens)
    there = tokens - asked.window + 1
    if there < 1:
        raise InputError(f"--window: got {asked.window}; the validation part has {tokens} tokens")
    number = asked.windows or min(there, INPUTS_OF_A_CHANNEL * width)
    if number > there:
        raise InputError(
            f"--windows: got {number}; the validation part of {subject.run.path} has {there} different ones"
        )
    if number <= width:
        raise InputError(
            f"--windows: got {number} for a width of {width}; any vectors can be turned into any others where there "
            f"are no more than channels: give {INPUTS_OF_A_CHANNEL * width}, or a longer text"
        )
    return number


@torch.no_grad()
def _representation(model: CausalLM, tokens: Tensor, asked: Perturbing) -> Tensor:
    """One vector for a window (b, d), float64."""
    return torch.cat([pooled(_hidden(model, some, asked.layer), asked.pool) for some in tokens.split(WINDOWS_AT_ONCE)])


def _hidden(model: CausalLM, tokens: Tensor, layer: int | None) -> Tensor:
    """What the head reads, (b, n, d), or the stream after so many blocks."""
    if layer is not None:
        return stream_of(model, tokens)[layer]
    with eagerly(model):  # losses in the place of logits, which may be large
        return model.norm(inputs_of(model, [model.norm], tokens, None, tokens)[-1])
