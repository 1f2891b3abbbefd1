"""Choosing the next token from logits.

A token is drawn by a race: every token waits for an exponential time of rate its probability, and the first wins.

    numbers = race_numbers(probabilities, generator)      E (b, v), independent, exponential of rate 1
    tokens = race_winners(probabilities, numbers)         argmax P / E (b,), which is n with probability P_n

The numbers do not depend on the probabilities, so that two models which race with the same numbers choose the same
token wherever their probabilities let them (coupled drafts, `kmixer.generation.acceptance`). Other random numbers of
one generator may be drawn between one race and the next.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kmixer import native
from kmixer.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: softmax(logits / temperature), cut to the likeliest.

    temperature 0 takes the likeliest token. top_k keeps the k likeliest; top_p the smallest set of
    likeliest tokens whose probability reaches p. With both, top_k is applied first.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature: got {self.temperature}; allowed: 0 (the likeliest token) or more")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k: got {self.top_k}; allowed: 1 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p: got {self.top_p}; allowed: above 0, up to 1")

    def __call__(self, logits: Float[Tensor, "b v"], generator: torch.Generator | None = None) -> Int[Tensor, " b"]:
        """The next token of every row.

        Raises InputError for logits that are no distribution: NaN, or infinity. A token of minus infinity is never
        drawn, and one at least has to be finite.
        """
        if self.temperature == 0:
            highest, tokens = logits.max(-1)
            # Of one row without a list: a prepared step takes little longer than the choice.
            if len(logits) != 1 or not math.isfinite(highest):
                _check_finite(highest.tolist())
            return tokens
        if native.usable(logits) and logits.is_contiguous() and draws_are_known():
            numbers = draw_numbers(logits.shape, generator)
            tokens = torch.empty(logits.shape[0], dtype=torch.int64)
            race(logits, numbers, _settings(self), tokens)
            return tokens if min(tokens.tolist(), default=0) >= 0 else self.by_definition(logits, numbers)
        probabilities = self.probabilities(logits)
        numbers = race_numbers(probabilities, generator)
        # As `race_winners`, into memory that is there: of 16 rows of 4096 a new array costs a sixth of the draw.
        return torch.div(probabilities.detach(), numbers, out=numbers).argmax(-1)

    def by_definition(self, logits: Float[Tensor, "b v"], numbers: Int[Tensor, "b v"]) -> Int[Tensor, " b"]:
        """What `race` draws with these numbers, at temperatures above 0, where it leaves the choice to the definition.

        Raises InputError as a call does.
        """
        return race_winners(self.probabilities(logits), exponential(numbers))

    def rows(self, logits: Float[Tensor, "*places v"]) -> Float[Tensor, "*places v"]:
        """The distribution of the next token in float64, at any temperature: one-hot at the first likeliest at 0.

        Raises InputError for logits that are no distribution.
        """
        if self.temperature > 0:
            return self.probabilities(logits)
        highest, tokens = logits.max(-1)
        _check_finite(highest.flatten().tolist())
        return one_hot(tokens, logits.shape[-1])

    def probabilities(self, logits: Float[Tensor, "*places v"]) -> Float[Tensor, "*places v"]:
        """The distribution the next token is drawn from, for temperatures above 0."""
        logits = logits.double()
        highest = logits.amax(-1, keepdim=True)  # NaN where there is one
        _check_finite(highest.flatten().tolist())
        scaled = (logits - highest) / self.temperature  # at most 0: nothing overflows
        if self.top_k is not None and self.top_k < scaled.shape[-1]:
            kept = scaled.topk(self.top_k, dim=-1)
            scaled = torch.full_like(scaled, -torch.inf).scatter(-1, kept.indices, kept.values)
        probabilities = torch.softmax(scaled, dim=-1)
        if self.top_p is not None:
            ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
            before = ordered.cumsum(-1) - ordered  # probability of everything likelier
            ordered = torch.where(before < self.top_p, ordered, 0.0)
            probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered)
            probabilities = probabilities / probabilities.sum(-1, keepdim=True)
        return probabilities


def race_numbers(
    probabilities: Float[Tensor, "*places v"], generator: torch.Generator | None = None
) -> Float[Tensor, "*places v"]:
    """The numbers of one race a row, exponential of rate 1, in the shape and precision of the probabilities."""
    return torch.empty_like(probabilities).exponential_(generator=generator)


def draw_numbers(shape: torch.Size, generator: torch.Generator | None = None) -> Int[Tensor, "*places v"]:
    """Whole numbers that `exponential` makes those of `race_numbers` of, from the same generator, which then stands
    where it would stand."""
    return torch.empty(shape, dtype=torch.int64).random_(generator=generator)


def exponential(numbers: Int[Tensor, "*places v"]) -> Float[Tensor, "*places v"]:
    """-log(1 - u), u the lowest 53 bits of each number as a fraction."""
    return -torch.log1p(-(numbers & (1 << 53) - 1).double() * 2.0**-53)


@functools.cache
def draws_are_known() -> bool:
    """Whether torch draws exponential numbers on this machine as `draw_numbers` takes them to be drawn."""
    ours, torchs = (torch.Generator().manual_seed(7) for _ in range(2))
    for shape in (torch.Size([1, 65]), torch.Size([3, 7]), torch.Size([5, 1000])):
        expected = race_numbers(torch.empty(shape, dtype=torch.float64), torchs)
        if not torch.allclose(exponential(draw_numbers(shape, ours)), expected, rtol=1e-14, atol=0.0):
            return False
    return torch.equal(ours.get_state(), torchs.get_state())


def race(logits: Tensor, numbers: Tensor, settings: Tensor, tokens: Tensor) -> None:
    """Write to `tokens` the winners (b,) of races on float32 logits (b, v), with `draw_numbers` (b, v), in one call.

    Where `draws_are_known` they are what `Sampling` draws. Settings (b, 3), or (1, 3) for all rows, are float64:
    temperature, top_k and top_p, 0 for none; at temperature 0 numbers are not looked at. A token is -1 where logits
    are no distribution, and -2 where rounding decides which tokens are cut: `Sampling.by_definition` sees to both.
    All are contiguous and on a CPU, which is not checked: of one row, that would take a third of the time.
    """
    rows, v = logits.shape
    step = 0 if settings.shape[0] == 1 else 3
    _compiled_race()(logits.data_ptr(), numbers.data_ptr(), settings.data_ptr(), tokens.data_ptr(), rows, v, step, 1)


def as_settings(sampling: Sampling) -> list[float]:
    """A row of the settings that `race` takes."""
    return [float(sampling.temperature), float(sampling.top_k or 0), sampling.top_p or 0.0]


@functools.cache
def _compiled_race() -> Callable[..., None]:
    library = native.kernels()
    assert library is not None
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 4, *[ctypes.c_int64] * 4)(("race", library))


@functools.lru_cache(maxsize=64)
def _settings(sampling: Sampling) -> Tensor:
    return torch.tensor([as_settings(sampling)], dtype=torch.float64)


def race_winners(
    probabilities: Float[Tensor, "*places v"], numbers: Float[Tensor, "*places v"]
) -> Int[Tensor, "*places"]:
    """The token that wins each race; probabilities may have any sum above 0. Ties go to the first."""
    return (probabilities / numbers).argmax(-1)


def one_hot(tokens: Int[Tensor, "*places"], vocabulary_size: int) -> Float[Tensor, "*places v"]:
    """Rows in float64 with all probability on one token."""
    rows = torch.zeros(*tokens.shape, vocabulary_size, dtype=torch.float64, device=tokens.device)
    return rows.scatter_(-1, tokens[..., None], 1.0)


def _check_finite(highest: list[float]) -> None:
    """Raises InputError where the highest logit of a row is not a number."""
    if not all(map(math.isfinite, highest)):
        raise InputError(
            "logits: got NaN or infinity, from which no token can be drawn; "
            "the model's weights are damaged or its training diverged: load others"
        )
