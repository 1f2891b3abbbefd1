"""The denoising benchmark: one block of each mixer on the motif-and-copy task, several seeds.

All are causal, though the task is to fill in: Koneko's choice, kept. A convolution of 7 taps is
blind to a motif of 8 tokens or more; one of 17 sees every whole period.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kmixer.data.denoising import Denoising, Samples, make_samples
from kmixer.experiments.descent import descend
from kmixer.experiments.rows import DenoisedMixer
from kmixer.experiments.statistics import paired_difference, summarize
from kmixer.layers import K2, BaseKernel, Block, FeedForward, SoftmaxAttention
from kmixer.layers.linear import linear
from kmixer.layers.norms import RMSNorm
from kmixer.state import State

WIDTH = 32
VALIDATION_SEED = 1 << 20


@dataclass(frozen=True)
class Budget:
    """Koneko's: 500 steps of 32 of 4,096 sequences, AdamW at 0.003 with weight decay 0.01, clipped at 1."""

    steps: int = 500
    batch_size: int = 32
    training: int = 4096
    validation: int = 1024
    learning_rate: float = 3e-3
    weight_decay: float = 0.01
    evaluate_every: int = 50


class Score(NamedTuple):
    """Over the corrupted positions: mean cross-entropy in nats, and the part of them that is restored."""

    loss: float
    accuracy: float


class CausalConvolution(nn.Module):
    """A full convolution over time, y_t = sum_l W_l x_{t-l} + b; its state are the last inputs (b, taps - 1, d)."""

    def __init__(self, width: int, taps: int) -> None:
        super().__init__()
        self.taps = taps
        self.convolution = nn.Conv1d(width, width, taps)

    def initial_state(self, batch_size: int) -> Tensor:
        weight = self.convolution.weight
        return weight.new_zeros(batch_size, self.taps - 1, weight.shape[1])

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, State]:
        before = self.initial_state(len(x)) if state is None else state
        x = torch.cat([before, x], dim=1)
        return self.convolution(x.mT).mT, x[:, x.shape[1] - self.taps + 1 :].clone()


def _block(mixer: nn.Module) -> Block:
    """The frame that K2 has built in, around another mixer."""
    return Block(RMSNorm(WIDTH), mixer, RMSNorm(WIDTH), FeedForward(WIDTH))


def _koneko_k2(length: int | None) -> Block:
    """K2 as Koneko's benchmark has it (family b); without a base kernel for a length of None."""
    kernel = None if length is None else BaseKernel("dense", length, init="uniform")
    return K2(
        WIDTH,
        8,
        base_kernel=kernel,
        gate_init=8.0,
        decay_range=(0.85, 1.0),
        decay_init="linear",
        alpha_cap=0.8,
        alpha_per_channel=False,
    )


# A block for sequences of a length, by name.
BLOCKS: dict[str, Callable[[int], Block]] = {
    "K2": _koneko_k2,
    "K2 without base kernel": lambda length: _koneko_k2(None),
    "convolution, 7 taps": lambda length: _block(CausalConvolution(WIDTH, 7)),
    "convolution, 17 taps": lambda length: _block(CausalConvolution(WIDTH, 17)),
    "softmax attention": lambda length: _block(SoftmaxAttention(WIDTH, 4)),
}


class Denoiser(nn.Module):
    """Embedding, one block, norm, linear map: tokens (b, t) to logits (b, t, v)."""

    def __init__(self, block: Block, task: Denoising) -> None:
        super().__init__()
        self.embedding = nn.Embedding(task.vocabulary + 1, WIDTH)
        self.block = block
        self.norm = RMSNorm(WIDTH)
        self.out = linear(WIDTH, task.vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        h, _ = self.block(self.embedding(tokens))
        return self.out(self.norm(h))


def run_denoising(
    seeds: list[int], task: Denoising, budget: Budget, report: Callable[[str, int, Score], None]
) -> list[DenoisedMixer]:
    """Train every mixer with every seed; a row per mixer, its difference in loss from the first paired by seed.

    Validation data are the same for all; a seed gives training data, weights and order, the same
    for every mixer. The reported loss is the lowest of the run's evaluations, and its accuracy.
    """
    validation = make_samples(task, budget.validation, VALIDATION_SEED)
    rows: list[DenoisedMixer] = []
    baseline: dict[int, float] = {}
    for name, make_block in BLOCKS.items():
        best: dict[int, Score] = {}
        parameters = 0
        for seed in seeds:
            torch.manual_seed(seed)
            model = Denoiser(make_block(task.length), task)
            parameters = sum(parameter.numel() for parameter in model.parameters())
            best[seed] = _train(model, make_samples(task, budget.training, seed), validation, budget, seed)
            report(name, seed, best[seed])
        losses = {seed: score.loss for seed, score in best.items()}
        baseline = baseline or losses
        loss, accuracy = summarize(list(losses.values())), summarize([score.accuracy for score in best.values()])
        difference = paired_difference(losses, baseline) if rows else None
        rows.append(
            DenoisedMixer(
                mixer=name,
                parameters=parameters,
                n=loss.n,
                seeds=seeds,
                loss=loss.mean,
                loss_deviation=loss.deviation,
                accuracy=accuracy.mean,
                accuracy_deviation=accuracy.deviation,
                difference=None if difference is None else difference.mean,
                interval=None if difference is None else difference.interval,
            )
        )
    return rows


def _train(model: Denoiser, samples: Samples, validation: Samples, budget: Budget, seed: int) -> Score:
    generator = torch.Generator().manual_seed(seed)
    best = Score(float("inf"), 0.0)

    def loss() -> Tensor:
        chosen = torch.randint(len(samples.inputs), (budget.batch_size,), generator=generator)
        return _score(model, Samples(*(part[chosen] for part in samples)))[0]

    for step in descend(model.parameters(), loss, budget):
        if step % budget.evaluate_every == 0 or step == budget.steps:
            with torch.no_grad():
                score = Score(*(float(value) for value in _score(model, validation)))
            if score.loss < best.loss:
                best = score
    return best


def _score(model: Denoiser, samples: Samples) -> tuple[Tensor, Tensor]:
    """Cross-entropy in nats and accuracy over the corrupted positions."""
    logits = model(samples.inputs)[samples.corrupted]
    targets = samples.targets[samples.corrupted]
    return F.cross_entropy(logits, targets), (logits.argmax(-1) == targets).double().mean()
