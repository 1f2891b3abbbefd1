"""Two ecologies: is what a model could learn from a share of its training text there when that share is small?

A share alpha of the training texts keeps its brackets, the others have blanks in their place. What is measured is

    discrimination = mean over pairs of (loss of the unbalanced twin - loss of the balanced text)    nats per character

on held-out pairs, though no training ever asked for balance. Beside it stand counters of n-grams with the same training
texts: what they tell apart is how usual a pattern of neighbours is, not nesting. See `kmixer.data.brackets`.

Source: the two ecologies of Dalla Riva 2026 (arXiv 2604.05469); counters and separated brackets are ours.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kmixer.data.brackets import (
    BEGIN,
    OPEN,
    VOCABULARY,
    Pairs,
    chunk_pairs,
    library_text,
    scrubbed,
    separated_pairs,
)
from kmixer.experiments.descent import descend
from kmixer.experiments.statistics import half_interval
from kmixer.generation.ngrams import count_ngrams
from kmixer.measure.evaluating import evaluating
from kmixer.models.causal_lm import CausalLM
from kmixer.models.matched import closest_hidden, size_of
from kmixer.models.mixers.registry import CARDS
from kmixer.models.transformer import TransformerConfig

# Texts come from this seed, so that all models are measured on the same ones.
DATA_SEED = 1 << 20
# Standard errors of an interval over pairs.
INTERVAL = 2


@dataclass(frozen=True)
class Setting:
    """How models are built and trained. AdamW without a schedule, clipped at 1."""

    steps: int = 500
    batch_size: int = 32
    learning_rate: float = 3e-3
    weight_decay: float = 0.01
    training: int = 8000  # texts
    measured: int = 400  # pairs
    width: int = 32
    layers: int = 2
    heads: int = 4
    rank: int = 8  # of mixers that have one


class Evaluation(NamedTuple):
    """Where texts come from, and the characters of context that counters have."""

    name: str
    pairs: Callable[[str, int, int], Pairs]
    contexts: tuple[int, ...]


EVALUATIONS = (
    Evaluation("chunks", chunk_pairs, (1, 2, 3)),
    Evaluation("separated", separated_pairs, (1, 3, 5)),
)


class Told(NamedTuple):
    """How well twins are told apart."""

    differences: Tensor  # of every pair, nats per character (n,)
    at_brackets: float  # nats per bracket

    def numbers(self) -> dict[str, float]:
        n = len(self.differences)
        return {
            "discrimination": float(self.differences.mean()),
            "error": float(self.differences.std() / n**0.5),  # over pairs
            "at_brackets": self.at_brackets,
            "right": float((0.5 + self.differences.sign() / 2).mean()),  # a draw is half right
        }


def configs(mixers: list[str], setting: Setting) -> dict[str, TransformerConfig]:
    """A model for every mixer: the largest with hidden layers of 4 d, the others with wider ones, of the same size."""

    def config(mixer: str, multiplier: float) -> TransformerConfig:
        ranked = "rank" in CARDS[mixer].settings.model_fields
        values = {
            "width": setting.width,
            "layers": setting.layers,
            "heads": setting.heads,
            "mixers": mixer,
            "mlp_multiplier": multiplier,
            **({mixer: {"rank": setting.rank}} if ranked else {}),
        }
        return TransformerConfig.parse(values, source=f"rescue, {mixer}")

    with torch.device("meta"):
        largest = max(size_of(CausalLM(config(mixer, 4.0), VOCABULARY)) for mixer in mixers)

    def matched(mixer: str) -> TransformerConfig:
        return closest_hidden(lambda hidden: config(mixer, hidden / setting.width), VOCABULARY, largest)

    return {mixer: matched(mixer) for mixer in mixers}


def run_rescue(
    mixers: list[str],
    alphas: list[float],
    seeds: list[int],
    setting: Setting,
    report: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Train every mixer at every share with every seed, on the texts of both evaluations; a result for each of these.

    A seed gives weights, which texts keep their brackets, and the order of training, the same for every mixer.
    """
    text = library_text()
    left = len(EVALUATIONS) * len(mixers) * len(alphas) * len(seeds)
    results = []
    for evaluation in EVALUATIONS:
        pairs = evaluation.pairs(text, setting.training + setting.measured, DATA_SEED)
        texts, held_out = pairs.balanced[setting.measured :], Pairs(*(part[: setting.measured] for part in pairs))
        counted = [count(kept_share(texts, alpha, seeds[0]), held_out, evaluation.contexts) for alpha in alphas]
        curves = []
        for mixer, config in configs(mixers, setting).items():
            told: list[list[Told]] = []
            for alpha in alphas:
                told.append([])
                for seed in seeds:
                    begun = time.monotonic()
                    told[-1].append(_train(config, kept_share(texts, alpha, seed), held_out, setting, seed))
                    left -= 1
                    minutes = left * (time.monotonic() - begun) / 60
                    value = told[-1][-1].numbers()["discrimination"]
                    what = f"{evaluation.name}, {mixer}, alpha {alpha:g}, seed {seed}: {value:+.3f} nats per character"
                    report(f"{what}; {left} trainings left, about {minutes:.1f} minutes")
            with torch.device("meta"):
                parameters = size_of(CausalLM(config, VOCABULARY))
            curves.append(
                {"mixer": mixer, "parameters": parameters, "shares": [_shares(of_alpha) for of_alpha in told]}
            )
            curves[-1]["beyond_counters"] = [
                {str(k): _beyond(of_alpha, of_counters[k]) for k in evaluation.contexts}
                for of_alpha, of_counters in zip(told, counted, strict=True)
            ]
        results.append(
            {
                "name": evaluation.name,
                "characters": texts.shape[1],
                "training": len(texts),
                "pairs": len(held_out.balanced),
                "alphas": alphas,
                "curves": curves,
                "counters": [
                    {"context": k, "shares": [of_counters[k].numbers() for of_counters in counted]}
                    for k in evaluation.contexts
                ],
            }
        )
    return results


def _shares(told: list[Told]) -> dict[str, list[float]]:
    """Of one share: every number by seed."""
    numbers = [one.numbers() for one in told]
    return {name: [of_seed[name] for of_seed in numbers] for name in numbers[0]}


def _beyond(told: list[Told], counter: Told) -> dict[str, float | None]:
    """What models tell apart more than a counter, nats per character, with its interval: the wider of two.

    Over seeds it is Student's, over pairs 2 standard errors of the mean over seeds.
    """
    advantages = torch.stack([one.differences for one in told]) - counter.differences
    of_seeds = half_interval(advantages.mean(1).tolist())
    of_pairs = INTERVAL * float(advantages.mean(0).std()) / advantages.shape[1] ** 0.5
    return {"mean": float(advantages.mean()), "interval": max(of_seeds or 0.0, of_pairs)}


def kept_share(texts: Tensor, alpha: float, seed: int) -> Tensor:
    """The texts, of which a share alpha keeps its brackets; those kept at one share are kept at every larger one."""
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))
    kept = order < round(alpha * len(texts))
    return torch.where(kept[:, None], texts, scrubbed(texts))


def count(texts: Tensor, held_out: Pairs, contexts: tuple[int, ...]) -> dict[int, Told]:
    """What counters with so many characters of context tell apart, smoothed after Witten and Bell.

    That a text ends is not told: of the balanced ones all end after a closing bracket.
    """
    ngrams = count_ngrams(_begun(texts).flatten(), VOCABULARY, max(contexts) + 1)
    told = {}
    for k in contexts:
        rows: dict[tuple[int, ...], np.ndarray] = {}

        def loss(tokens: list[int], rows: dict[tuple[int, ...], np.ndarray] = rows, k: int = k) -> list[float]:
            losses = []
            for position in range(1, len(tokens)):
                context = tuple(tokens[max(0, position - k) : position])
                if context not in rows:
                    row = ngrams.row(context)
                    rows[context] = np.log1p(-row[BEGIN]) - np.log(row)
                losses.append(float(rows[context][tokens[position]]))
            return losses

        losses = [torch.tensor([loss(row) for row in _begun(part).tolist()]).double() for part in held_out]
        told[k] = _told(held_out, *losses)
    return told


def _train(config: TransformerConfig, texts: Tensor, held_out: Pairs, setting: Setting, seed: int) -> Told:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CausalLM(config, VOCABULARY)
    generator = torch.Generator().manual_seed(seed)

    def loss() -> Tensor:
        chosen = torch.randint(len(texts), (setting.batch_size,), generator=generator)
        return _losses(model, texts[chosen]).mean()

    for _ in descend(model.parameters(), loss, setting):
        pass
    with evaluating(model), torch.no_grad():
        return _told(held_out, *(_losses(model, part).double() for part in held_out))


def _losses(model: CausalLM, texts: Tensor) -> Tensor:
    """Of every character (n, t)."""
    losses = model(_begun(texts)[:, :-1], targets=texts).losses
    assert losses is not None
    return losses


def _begun(texts: Tensor) -> Tensor:
    """With the token that stands before the first."""
    return torch.cat([texts.new_full((len(texts), 1), BEGIN), texts], dim=1)


def _told(held_out: Pairs, balanced: Tensor, twins: Tensor) -> Told:
    """From the losses (n, t) of texts and twins; brackets are at the same places in both."""
    more = twins - balanced
    return Told(more.mean(1), float(more[held_out.balanced >= OPEN].mean()))
