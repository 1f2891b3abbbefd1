"""Rules that decide token by token whether a drafted token is kept: what probability each gives to it.

A token n was drawn from the draft's row p; the verifier's row is q. A rule names the row h that it aims at, which may
depend on n. Then everything else follows:

    n is kept with probability min(1, h_n / p_n)
    otherwise the token is drawn from (h - p)_+, divided by its sum

Where h does not depend on n, what is emitted has the law h whatever p is. Of the rules here that holds for `Exact`
(h = q), `Bounded` and `Interp`. All rows are float64; h >= 0 and sums to 1.

Sources: Leviathan et al. 2023 and Chen et al. 2023 (exact); Hao and Mou 2026 (Cactus); Cai et al. 2024 (typical
acceptance); Vivien 2023 (bounded, as "mentored decoding").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

# A search cuts an interval into so many parts so many times: as fine as 60 bisections (32^12 = 2^60), in a fifth of
# the calls, which cost more than their numbers.
PARTS, CUTS = 32, 12
TINY = torch.finfo(torch.float64).tiny
LEAST = -1 + torch.finfo(torch.float64).eps / 2  # above -1, where a logarithm ends

Rows = Float[Tensor, "*places v"]
Drafted = Int[Tensor, "*places"]
Masses = Float[Tensor, "*places"]


@runtime_checkable
class Rule(Protocol):
    """A rule, for rows of any number of places at once."""

    def mass(self, p: Tensor, q: Tensor, tokens: Tensor) -> Tensor:
        """h_n (*places) of the drafted tokens (*places); p and q are (*places, v)."""
        ...

    def aim(self, p: Tensor, q: Tensor, tokens: Tensor) -> Tensor:
        """h (*places, v), of which `mass` is one number."""
        ...


@dataclass(frozen=True)
class Exact:
    """h = q: what is emitted has the verifier's law, and no rule with that law keeps more of single tokens."""

    def mass(self, p: Rows, q: Rows, tokens: Drafted) -> Masses:
        return chosen(q, tokens)

    def aim(self, p: Rows, q: Rows, tokens: Drafted) -> Rows:
        return q


@dataclass(frozen=True)
class Cactus:
    """The most that h_n can be with KL(h, q) <= delta, given n; the others keep their ratios.

        h_n = gamma = min(1, q_n + sqrt(2 delta q_n (1 - q_n))),  h_i = q_i (1 - gamma) / (1 - q_n)

    as published, the second-order step of Taylor; with `exact_gamma` the root in [q_n, 1] of kl(gamma, q_n) = delta.
    delta is the budget of one drafted token. It bounds neither the divergence of what is emitted nor a sequence's.
    """

    delta: float
    exact_gamma: bool = False

    def mass(self, p: Rows, q: Rows, tokens: Drafted) -> Masses:
        drafted = chosen(q, tokens)
        if self.exact_gamma:
            return _largest_gamma(drafted, self.delta)
        return (drafted + (2 * self.delta * drafted * (1 - drafted)).clamp_min(0).sqrt()).clamp_max(1)

    def aim(self, p: Rows, q: Rows, tokens: Drafted) -> Rows:
        gamma = self.mass(p, q, tokens)
        shrunk = (1 - gamma) / (1 - chosen(q, tokens)).clamp_min(TINY)  # where q_n = 1, gamma is 1 too
        return (q * shrunk[..., None]).scatter(-1, tokens[..., None], gamma[..., None])


@dataclass(frozen=True)
class Bounded:
    """The nearest to p within KL(h, q) <= bound: the most acceptance, 1 - TV(p, h), that such a law can have.

        h = clip(p, alpha q, beta q),  alpha <= 1 <= beta,  sum h = 1

    and h = p where KL(p, q) <= bound. What is emitted has the law h.
    """

    bound: float

    def mass(self, p: Rows, q: Rows, tokens: Drafted) -> Masses:
        return chosen(nearest_within(p, q, self.bound), tokens)

    def aim(self, p: Rows, q: Rows, tokens: Drafted) -> Rows:
        return nearest_within(p, q, self.bound)


@dataclass(frozen=True)
class Typical:
    """A token is kept if the verifier finds it likely enough; otherwise its likeliest token is emitted.

    n is kept where q_n > min(epsilon, alpha exp(-H(q))), H the entropy. The likeliest token is always kept.
    """

    epsilon: float = 0.09
    alpha: float = 0.3

    def mass(self, p: Rows, q: Rows, tokens: Drafted) -> Masses:
        return (self._emitted(q, tokens) == tokens).double()

    def aim(self, p: Rows, q: Rows, tokens: Drafted) -> Rows:
        return torch.zeros_like(q).scatter(-1, self._emitted(q, tokens)[..., None], 1.0)

    def _emitted(self, q: Rows, tokens: Drafted) -> Drafted:
        least = (self.alpha * torch.exp(-torch.special.entr(q).sum(-1))).clamp_max(self.epsilon)
        return torch.where(chosen(q, tokens) > least, tokens, q.argmax(-1))


@dataclass(frozen=True)
class Interp:
    """h = mix p + (1 - mix) q. It emits tokens that the verifier's filters remove."""

    mix: float

    def mass(self, p: Rows, q: Rows, tokens: Drafted) -> Masses:
        return self.mix * chosen(p, tokens) + (1 - self.mix) * chosen(q, tokens)

    def aim(self, p: Rows, q: Rows, tokens: Drafted) -> Rows:
        return self.mix * p + (1 - self.mix) * q


def chosen(rows: Rows, tokens: Drafted) -> Masses:
    """Of every row the entry of its token."""
    return rows.gather(-1, tokens[..., None])[..., 0]


def spent(gamma: Masses, q: Masses) -> Masses:
    """kl(gamma, q) = gamma ln(gamma / q) + (1 - gamma) ln((1 - gamma) / (1 - q)) in nats, of single numbers.

    For Cactus' h it is KL(h, q). Precise where gamma is near q, which a search for gamma needs at small delta.
    """
    more = gamma - q
    drafted = torch.special.xlog1py(gamma, more / q.clamp_min(TINY))
    others = torch.special.xlog1py(1 - gamma, (-more / (1 - q)).clamp_min(LEAST))
    return torch.where(more == 0, 0.0, drafted + others)


def _largest_gamma(q: Masses, delta: float) -> Masses:
    """The root in [q, 1] of kl(gamma, q) = delta; 1 where all may go to one token, and 0 where q is 0."""
    q_last = q[..., None]
    gamma = _largest_within(lambda gamma: spent(gamma, q_last.expand_as(gamma)), q_last, torch.ones_like(q_last), delta)
    return torch.where(q == 0, 0.0, torch.where(-q.log() <= delta, 1.0, gamma[..., 0]))


def nearest_within(p: Rows, q: Rows, bound: float) -> Rows:
    """h of `Bounded`.

    With the tokens in the order of p / q, those above beta and those below alpha are an end and a beginning, whose
    sums are known. alpha follows from beta, what is taken above being what is given below; ln beta is searched for in
    [0, the largest ln p / q], over which the divergence grows.
    """
    ratio = torch.where(q > 0, p / q, torch.inf)
    ratio, order = ratio.sort(-1)
    p_sorted, q_sorted = p.gather(-1, order), q.gather(-1, order)
    # Sums of the first k and of the last v - k, k = 0 .. v; the sums of an end are no differences, which would lose
    # the digits of small numbers.
    p_below, q_below = _sums(p_sorted), _sums(q_sorted)
    p_above, q_above = (_sums(x.flip(-1)).flip(-1) for x in (p_sorted, q_sorted))
    finite = torch.where(ratio < torch.inf, ratio, 0.0)
    between = _sums(q_sorted * _divergence_of(finite))  # of tokens where h = p
    given = torch.where(ratio < torch.inf, (finite * q_below[..., 1:] - p_below[..., 1:]).clamp_min(0), torch.inf)

    def alpha_and_divergence(log_beta: Tensor) -> tuple[Tensor, Tensor]:
        """For numbers (*places, n)."""
        beta = log_beta.exp()
        above = torch.searchsorted(ratio, beta, right=True)
        taken = (p_above.gather(-1, above) - beta * q_above.gather(-1, above)).clamp_min(0)
        below = torch.searchsorted(given, taken, right=True).clamp_min(1)
        alpha = ((taken + p_below.gather(-1, below)) / q_below.gather(-1, below)).clamp_max(1)
        middle = (between.gather(-1, above) - between.gather(-1, below)).clamp_min(0)
        ends = q_below.gather(-1, below) * _divergence_of(alpha) + q_above.gather(-1, above) * _divergence_of(beta)
        return alpha, middle + ends

    largest = finite.amax(-1, keepdim=True).clamp_min(1).log()
    low = _largest_within(lambda x: alpha_and_divergence(x)[1], torch.zeros_like(largest), largest, bound)
    alpha, beta = alpha_and_divergence(low)[0], low.exp()
    return torch.minimum(torch.maximum(p, alpha * q), beta * q)


def _largest_within(
    divergence: Callable[[Tensor], Tensor], low: Tensor, high: Tensor, bound: float
) -> Float[Tensor, "*places 1"]:
    """The largest number in [low, high] (*places, 1) whose divergence is at most the bound; it grows from 0 at low."""
    steps = torch.linspace(0, 1, PARTS + 1, dtype=low.dtype, device=low.device)
    for _ in range(CUTS):
        grid = low + (high - low) * steps
        within = (divergence(grid) <= bound).sum(-1, keepdim=True) - 1
        low, high = (grid.gather(-1, index.clamp(0, PARTS)) for index in (within, within + 1))
    return low


def _sums(x: Rows) -> Float[Tensor, "*places w"]:
    """Sums of the first k numbers, k = 0 .. v."""
    return torch.nn.functional.pad(x.cumsum(-1), (1, 0))


def _divergence_of(ratio: Tensor) -> Tensor:
    """s ln s - s + 1 >= 0, whose mean under q is KL(h, q) for s = h / q; precise near 1, and 1 at 0."""
    less = ratio - 1
    return torch.where(ratio < 0.5, torch.special.xlogy(ratio, ratio), torch.special.xlog1py(ratio, less)) - less
