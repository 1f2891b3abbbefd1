"""The ablation of heads: what cross-entropy and squared error make of one encoder that reads the same tokens.

Values of a series become tokens of a codebook. Both arms begin with the same weights of the encoder and read the same
batches; one head predicts the token of the next value, the other the value. Then a share of the values gets noise, is
encoded again, and the representations of both are compared; see `kmixer.measure.geometry`.

Source: Raju 2026 (arXiv 2604.04155), at a larger size and with one seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kmixer.data.codebooks import Codebook, draw_noise, learned_codebook, uniform_codebook
from kmixer.data.systems import Series, make_series
from kmixer.experiments.descent import descend
from kmixer.layers.linear import INITIAL_STD, linear
from kmixer.measure.decoding import decode
from kmixer.measure.evaluating import evaluating
from kmixer.measure.geometry import DIRECTIONS, INPUTS_OF_A_CHANNEL, measure_moves
from kmixer.models.matched import size_of
from kmixer.models.transformer import Transformer, TransformerConfig, build_norm
from kmixer.runs.lab_geometry import Decoded, HeadArm, Moves

VALIDATION_SEED = 1 << 20
EVALUATED_AT_ONCE = 128
Pool = Literal["mean", "last"]


@dataclass(frozen=True)
class Setting:
    """How arms are built, trained and measured. AdamW without a schedule, clipped at 1."""

    steps: int = 300
    length: int = 64
    width: int = 32
    layers: int = 2
    heads: int = 4
    batch_size: int = 32
    training: int = 2000  # sequences
    learning_rate: float = 3e-3
    weight_decay: float = 0.01
    learned: bool = False  # codebooks by k-means of the values; otherwise equal bins
    rates: tuple[float, ...] = (0.01, 0.05, 0.1)
    pool: Pool = "mean"
    least_inputs: int = 1024
    decoded_from: int = 8  # the first position whose state is read out

    @property
    def inputs(self) -> int:
        """Sequences that are measured."""
        return max(self.least_inputs, INPUTS_OF_A_CHANNEL * self.width)

    @property
    def directions(self) -> int:
        """k of D_k."""
        return min(DIRECTIONS, self.width)


class Encoder(nn.Module):
    """Embedding, blocks, norm: tokens (b, t) to hidden vectors (b, t, d)."""

    def __init__(self, mixer: str, codes: int, setting: Setting) -> None:
        super().__init__()
        values = {"width": setting.width, "layers": setting.layers, "heads": setting.heads, "mixers": mixer}
        config = TransformerConfig.parse(values, source=f"lab geometry, {mixer}")
        self.embedding = nn.Embedding(codes, setting.width)
        nn.init.normal_(self.embedding.weight, std=INITIAL_STD)
        self.stack = Transformer(config)
        self.norm = build_norm(config, "final")

    def forward(self, tokens: Tensor) -> Tensor:
        h, _ = self.stack(self.embedding(tokens))
        return self.norm(h)


class TokenHead(nn.Module):
    """Logits of the next token; the predicted value is the mean of the centres under them."""

    def __init__(self, width: int, codes: int) -> None:
        super().__init__()
        self.map = linear(width, codes)

    def loss(self, h: Tensor, tokens: Tensor, values: Tensor) -> Tensor:
        return F.cross_entropy(self.map(h).flatten(0, 1), tokens.flatten())

    def predicted(self, h: Tensor, centres: Tensor) -> Tensor:
        return self.map(h).softmax(-1).double() @ centres


class ValueHead(nn.Module):
    """The next value itself, scaled to [0, 1]."""

    def __init__(self, width: int, codes: int) -> None:
        super().__init__()
        self.map = linear(width, 1)

    def loss(self, h: Tensor, tokens: Tensor, values: Tensor) -> Tensor:
        return F.mse_loss(self.map(h).squeeze(-1), values)

    def predicted(self, h: Tensor, centres: Tensor) -> Tensor:
        return self.map(h).squeeze(-1).double()


Head = TokenHead | ValueHead
HEADS: dict[str, type[TokenHead] | type[ValueHead]] = {"ce": TokenHead, "mse": ValueHead}


class Arms(NamedTuple):
    """What is compared: every combination."""

    systems: list[str]
    mixers: list[str]
    heads: list[str]
    codebooks: list[int]
    seeds: list[int]

    @property
    def number(self) -> int:
        """How many encoders are trained."""
        return math.prod(len(names) for names in self)


def build_arm(mixer: str, head: str, codes: int, seed: int, setting: Setting) -> tuple[Encoder, Head]:
    """Fresh weights; the encoder's are the same for every head. The generator of the process is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = Encoder(mixer, codes, setting)
        return encoder, HEADS[head](setting.width, codes)


def run_ablation(arms: Arms, setting: Setting, report: Callable[[HeadArm], None]) -> list[HeadArm]:
    """Train and measure every arm, those that are compared one after the other.

    Sequences that are measured and their noise are the same for all seeds; a seed gives weights, training sequences,
    from which the codebook is made, and batches, the same for every mixer and head.
    """
    measured = []
    for system in arms.systems:
        held_out = make_series(system, setting.inputs, setting.length, VALIDATION_SEED)
        for seed in arms.seeds:
            training = make_series(system, setting.training, setting.length, seed)
            for codes in arms.codebooks:
                codebook = (learned_codebook if setting.learned else uniform_codebook)(training.values, codes)
                coded = Coded(held_out, codebook, setting)
                for mixer in arms.mixers:
                    names: dict[str, Any] = {"system": system, "mixer": mixer, "codes": codes, "seed": seed}
                    for arm in _arms_of_encoder(names, arms.heads, training.values, coded, setting):
                        measured.append(arm)
                        report(arm)
    return measured


def _arms_of_encoder(
    names: dict[str, Any], heads: list[str], training: Tensor, coded: Coded, setting: Setting
) -> Iterator[HeadArm]:
    """One encoder, measured as it begins, and trained with each of the heads."""
    begun: tuple[Moves, dict[str, dict[str, float]]] | None = None
    for name in heads:
        encoder, head = build_arm(names["mixer"], name, names["codes"], names["seed"], setting)
        begun = begun or coded.measure(encoder)
        _train(encoder, head, training, coded.codebook, setting, names["seed"])
        moves, read = coded.measure(encoder)
        yield HeadArm(
            **names,
            head=name,
            parameters=size_of(encoder),
            trained=moves,
            untrained=begun[0],
            changed=coded.changed,
            next_value=coded.error_of(encoder, head),
            repeating=coded.repeating,
            coding=coded.coding,
            decoded={
                variable: Decoded(**read[variable], **{f"untrained_{way}": value for way, value in before.items()})
                for variable, before in begun[1].items()
            },
        )


def _train(encoder: Encoder, head: Head, training: Tensor, codebook: Codebook, setting: Setting, seed: int) -> None:
    scaled = codebook.scaled(training)
    tokens, values = codebook.encode(scaled), scaled.float()
    generator = torch.Generator().manual_seed(seed)

    def loss() -> Tensor:
        chosen = torch.randint(len(tokens), (setting.batch_size,), generator=generator)
        return head.loss(encoder(tokens[chosen, :-1]), tokens[chosen, 1:], values[chosen, 1:])

    for _ in descend([*encoder.parameters(), *head.parameters()], loss, setting):
        pass


class Coded:
    """Sequences that encoders are measured on, as tokens of a codebook: clean, and with every rate of noise."""

    def __init__(self, series: Series, codebook: Codebook, setting: Setting) -> None:
        self.codebook, self.setting = codebook, setting
        self.scaled = codebook.scaled(series.values)
        self.states = {name: state[:, setting.decoded_from : -1] for name, state in series.states.items()}
        self.tokens = codebook.encode(self.scaled[:, :-1])
        noise = draw_noise(tuple(self.tokens.shape), VALIDATION_SEED)
        self.noisy = [codebook.encode(noise.added(self.scaled[:, :-1], rate)) for rate in setting.rates]
        self.changed = [float((other != self.tokens).double().mean()) for other in self.noisy]
        now, following = self.scaled[:, :-1], self.scaled[:, 1:]
        self.repeating = _root_mean_square(following - now)
        self.coding = _root_mean_square(codebook.centres[codebook.encode(now)] - now)

    def measure(self, encoder: Encoder) -> tuple[Moves, dict[str, dict[str, float]]]:
        """How far noise moves the representations of an encoder, and what can be read from its hidden vectors."""
        hidden = encoded(encoder, self.tokens)
        perturbed = [self.pooled(encoded(encoder, tokens)) for tokens in self.noisy]
        moves = measure_moves(self.pooled(hidden), perturbed, directions=self.setting.directions)
        return Moves(**moves), decode(hidden[:, self.setting.decoded_from :], self.states)

    def pooled(self, hidden: Tensor) -> Tensor:
        return pooled(hidden, self.setting.pool)

    @torch.no_grad()
    def error_of(self, encoder: Encoder, head: Head) -> float:
        """Root mean square error of the next value."""
        guesses = head.predicted(encoded(encoder, self.tokens), self.codebook.centres)
        return _root_mean_square(guesses - self.scaled[:, 1:])


@torch.no_grad()
def encoded(encoder: nn.Module, tokens: Tensor) -> Tensor:
    """Hidden vectors of many sequences, in evaluation mode."""
    with evaluating(encoder):
        return torch.cat([encoder(some) for some in tokens.split(EVALUATED_AT_ONCE)])


def pooled(hidden: Tensor, pool: Pool) -> Tensor:
    """One vector (b, d) for a sequence (b, t, d)."""
    return hidden.double().mean(1) if pool == "mean" else hidden[:, -1].double()


def _root_mean_square(errors: Tensor) -> float:
    return float(errors.square().mean().sqrt())
