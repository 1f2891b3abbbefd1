"""Sources of text as an ecology: what follows shared contexts in each, and what differs by chance alone.

A text is no sample: it dwells on subjects, so that two parts of one source differ more than two samples of its law
would. So the null is a split of one source into two halves of shuffled blocks, and all is measured on such halves:

    JS(A, B)   between a half of A and one of B, mean over splits
    null of A  between both halves of A
    corrected  JS(A, B) - (null of A + null of B) / 2, which is 0 in the mean for two texts of one source, at any size
    error      standard error of JS over groups of blocks, each left out once (delete-a-group jackknife)

A cell of several sources is corrected by pi_x sum_w 2 alpha_w (1 - alpha_w) null_w, which for two is the same.

Plug-in JS of two samples of one law, n each, over v outcomes is (v - 1) / (4 n) in the mean, for comparison.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kmixer.errors import InputError, shown
from kmixer.measure.ecology import Losses, Masks, Numbers, members_of, set_losses

SPLITS = 8
# Groups of blocks that are left out in turn.
GROUPS = 20
# Tokens of a chunk, where contexts are its beginnings.
CHUNK = 30
# Numbers of all laws that are held at once: 512 MB.
LARGEST = 1 << 26
ALLOWED = "none, suffix:2 or another length from 1 on, length:3,5,8 or other lengths below 30"


@dataclass(frozen=True)
class Context:
    """What a context is: the last tokens, how many of a chunk have been read, or nothing."""

    kind: Literal["suffix", "length"]
    lengths: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> Context:
        """Of "suffix:2", "length:3,5,8" or "none". Raises InputError for anything else."""
        kind, _, numbers = text.partition(":")
        parts = numbers.split(",")
        lengths = [int(part) for part in parts if part.isascii() and part.isdigit() and len(part) < 4]
        if text == "none":
            return cls("suffix", (0,))
        if kind == "suffix" and len(lengths) == len(parts) == 1 and lengths[0] >= 1:
            return cls("suffix", (lengths[0],))
        if kind == "length" and len(lengths) == len(parts) and all(1 <= length < CHUNK for length in lengths):
            return cls("length", tuple(dict.fromkeys(lengths)))
        raise InputError(f"--context: got {shown(text)}; allowed: {ALLOWED}")


class Shared(NamedTuple):
    """The contexts that every source has often enough."""

    at: list[Tensor]  # of every position of every source (n,): the number of its context, -1 where it has none of these
    marginal: Tensor  # D: the mean of the sources' frequencies of these (c,)
    coverage: list[float]  # which part of its positions has one, by source


class Followers(NamedTuple):
    """What followed contexts in one source."""

    contexts: Tensor  # (n,)
    blocks: Tensor  # of the text that each is from (n,)
    outcomes: Tensor  # tokens (n,), or laws (n, v)


class Halves(NamedTuple):
    """One split: laws of both halves of every source (2, w, c, v), and the marginal of the contexts that all have."""

    laws: Tensor
    marginal: Tensor


def shared_contexts(tokens: Sequence[Tensor], vocabulary: int, context: Context, min_count: int) -> Shared:
    """Those that every source (n,) has at least `min_count` times. Raises InputError where there are none."""
    if context.kind == "suffix":
        numbers = _suffixes(tokens, vocabulary, context.lengths[0])
    else:
        index_of = torch.full((CHUNK,), -1)
        index_of[list(context.lengths)] = torch.arange(len(context.lengths))
        numbers = [index_of.repeat(len(x) // CHUNK + 1)[: len(x)] for x in tokens]
    size = 1 + max(int(of_source.max()) for of_source in numbers)
    counts = torch.stack([torch.bincount(of_source[of_source >= 0], minlength=size) for of_source in numbers])
    kept = (counts >= min_count).all(0)
    if not kept.any():
        raise InputError(
            f"no context occurs {min_count} times in every source of {len(tokens[0]):,} tokens; lower --min-count, "
            "choose a shorter --context or give longer texts"
        )
    new = torch.where(kept, kept.long().cumsum(0) - 1, -1)
    at = [torch.where(of_source >= 0, new[of_source.clamp(min=0)], -1) for of_source in numbers]
    frequencies = counts[:, kept].double()
    coverage = frequencies.sum(1) / (counts.sum(1))
    return Shared(at, (frequencies / frequencies.sum(1, keepdim=True)).mean(0), coverage.tolist())


def _suffixes(tokens: Sequence[Tensor], vocabulary: int, length: int) -> list[Tensor]:
    """The number of the last `length` tokens before every position, -1 where there are fewer before it."""
    numbers = [torch.zeros(len(x) - length, dtype=torch.int64) for x in tokens]
    for back in range(length, 0, -1):
        keys = [
            number * vocabulary + x[length - back : len(x) - back] for number, x in zip(numbers, tokens, strict=True)
        ]
        joined = torch.unique(torch.cat(keys), return_inverse=True)[1]
        numbers = list(joined.split([len(number) for number in numbers]))
    none = torch.full((length,), -1)
    return [torch.cat([none, number]) for number in numbers]


def followers_of(tokens: Sequence[Tensor], shared: Shared, blocks: int) -> tuple[list[Followers], int]:
    """What follows shared contexts in every source, and v, the number of tokens that do at all."""
    kept = [at >= 0 for at in shared.at]
    outcomes, inverse = torch.unique(
        torch.cat([x[of_source] for x, of_source in zip(tokens, kept, strict=True)]), return_inverse=True
    )
    parts = inverse.split([int(of_source.sum()) for of_source in kept])
    followers = [
        Followers(at[of_source], blocks_of(len(at), blocks)[of_source], part)
        for at, of_source, part in zip(shared.at, kept, parts, strict=True)
    ]
    return followers, len(outcomes)


def blocks_of(n: int, blocks: int) -> Tensor:
    """Which of equal blocks every position of a text is in (n,)."""
    return torch.arange(n) * blocks // n


class Ecology:
    """Sources, each with the same prior, measured on halves.

    Args:
        followers: of every source.
        marginal: D over contexts.
        vocabulary: v.
        blocks: of every source.
        splits: into halves.
        seed: of the splits.

    Raises InputError where it would not fit into memory, and for contexts that no split has in all halves.
    """

    def __init__(
        self, followers: Sequence[Followers], marginal: Tensor, vocabulary: int, blocks: int, splits: int, seed: int
    ) -> None:
        self.followers, self.vocabulary = followers, vocabulary
        w, self.whole = len(followers), marginal
        if 2 * splits * w * len(marginal) * vocabulary > LARGEST:
            raise InputError(
                f"{len(marginal):,} contexts with {vocabulary:,} tokens that follow, of {w} sources, are too many to "
                "hold; raise --min-count, or choose a shorter --context"
            )
        self.prior = np.full(w, 1 / w)
        generator = torch.Generator().manual_seed(seed)
        self.blocks = blocks
        self.total = self._sums(torch.ones(w, blocks, dtype=torch.bool))
        self.halves = [self._split(generator) for _ in range(splits)]
        order = torch.randperm(blocks, generator=generator)
        self.groups = order.tensor_split(min(GROUPS, blocks))
        self._known: dict[int, float] = {}

    @property
    def coverage(self) -> float:
        """Which part of D lies on contexts that all halves have, mean over splits."""
        return float(np.mean([float(self.whole[half.marginal > 0].sum()) for half in self.halves]))

    def losses(self, masks: Masks) -> Numbers:
        """pi_S E_c H(P_S) of sets of sources, mean over all halves."""
        new = np.array([mask for mask in np.unique(masks).tolist() if mask not in self._known])
        if len(new):
            of_halves = [set_losses(laws, half.marginal, self.prior, new) for half in self.halves for laws in half.laws]
            self._known.update(zip(new.tolist(), np.mean(of_halves, axis=0).tolist(), strict=True))
        return np.array([self._known[mask] for mask in masks.tolist()])

    @cached_property
    def null(self) -> Numbers:
        """JS between both halves of a source (splits, w)."""
        return np.array([_divergence(half.laws[0], half.laws[1], half.marginal).tolist() for half in self.halves])

    def corrected(self) -> Losses:
        """The losses without what the null makes of them."""
        null = self.null.mean(0)

        def losses(masks: Masks) -> Numbers:
            return self.losses(masks) - self._noise(masks, null)

        return losses

    def largest_noise(self, masks: Masks) -> Numbers:
        """What the largest split of any source in a set would make of its excess."""
        largest = np.where(members_of(masks, len(self.prior)), self.null.max(0), 0).max(1, keepdims=True)
        return self._noise(masks, largest)

    def left_out(self, masks: Masks) -> Numbers:
        """The losses of sets (g, n) without a group of blocks of every source."""
        rows = []
        for group in self.groups:
            chosen = torch.zeros(len(self.followers), self.blocks, dtype=torch.bool)
            chosen[:, group] = True
            laws, there = _laws(self.total - self._sums(chosen))
            rows.append(set_losses(laws, self._on(there), self.prior, masks))
        return np.array(rows)

    def _noise(self, masks: Masks, null: Numbers) -> Numbers:
        members = members_of(masks, len(self.prior)) * self.prior
        mass = members.sum(1, keepdims=True)
        alpha = members / mass
        noise: Numbers = mass[:, 0] * (2 * alpha * (1 - alpha) * null).sum(1)
        return noise

    def _split(self, generator: torch.Generator) -> Halves:
        first = torch.zeros(len(self.followers), self.blocks, dtype=torch.bool)
        for row in first:
            row[torch.randperm(self.blocks, generator=generator)[: self.blocks // 2]] = True
        sums = self._sums(first)
        (laws, there), (others, also) = _laws(sums), _laws(self.total - sums)
        return Halves(torch.stack([laws, others]), self._on(there & also))

    def _sums(self, chosen: Tensor) -> Tensor:
        """What followed every context (w, c, v) in the chosen blocks (w, b) of the sources."""
        contexts, v = len(self.whole), self.vocabulary
        sums = torch.zeros(len(self.followers), contexts, v, dtype=torch.float64)
        for of_source, followers, blocks in zip(sums, self.followers, chosen, strict=True):
            kept = blocks[followers.blocks]
            at, outcomes = followers.contexts[kept], followers.outcomes[kept]
            if outcomes.ndim == 1:
                of_source += torch.bincount(at * v + outcomes, minlength=contexts * v).view(contexts, v)
            else:
                of_source.index_add_(0, at, outcomes.double())
        return sums

    def _on(self, there: Tensor) -> Tensor:
        marginal = self.whole * there
        if not there.any():
            raise InputError("no context is in both halves of every source; lower --blocks or give longer texts")
        return marginal / marginal.sum()


def standard_error(left_out: Numbers) -> Numbers:
    """Of what was measured without each of g groups (g, ...)."""
    g = len(left_out)
    error: Numbers = np.sqrt((g - 1) / g * np.square(left_out - left_out.mean(0)).sum(0))
    return error


def _laws(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Laws (w, c, v) of what followed, and which contexts all sources have (c,)."""
    sums = sums.clamp(min=0)  # a difference of sums may be below by rounding
    totals = sums.sum(-1, keepdim=True)  # whole numbers but for that
    return sums / totals.clamp(min=0.5), (totals[..., 0] > 0.5).all(0)


def _divergence(first: Tensor, second: Tensor, marginal: Tensor) -> Tensor:
    """E_c JS (w,) of laws (w, c, v), each pair with equal weights."""
    mixed = (first + second) / 2
    entropies = torch.xlogy(first, first) / 2 + torch.xlogy(second, second) / 2 - torch.xlogy(mixed, mixed)
    return entropies.sum(-1) @ marginal
