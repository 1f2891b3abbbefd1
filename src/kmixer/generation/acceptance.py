"""Which drafted tokens of a round are kept, and the token that is drawn after them.

A draft proposed tokens x_1 .. x_m, drawn from its rows p_1 .. p_m; the verifier has rows q_1 .. q_{m+1}. The first k
are kept, and one token is drawn: after a refusal from what the rule leaves, after m kept ones from q_{m+1}.

* `accept`: a rule of `kmixer.generation.rules`, token by token.
* `accept_block`: all tokens judged together (Sun et al. 2024); the verifier's law, never fewer kept in expectation.
* `accept_coupled`: draft and verifier race with the same numbers (Daliri et al. 2025), see
  `kmixer.generation.sampling`; what is emitted are the tokens that plain generation with these numbers draws.

All numbers of a round come from one generator, in a fixed order: those of the draft, m uniforms a row, one race.
Nothing here divides by what may be 0, and rows with zeros or ones are as good as others.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kmixer.generation.rules import TINY, Rows, Rule, chosen
from kmixer.generation.sampling import race_numbers, race_winners

# Numbers of one array where a law is summed over all drafted tokens: v^2 a row.
LAW_NUMBERS = 1 << 22


class Verdict(NamedTuple):
    """How many drafted tokens of every row are kept, and the token drawn after them."""

    kept: Int[Tensor, " b"]
    last: Int[Tensor, " b"]


def accept(
    rule: Rule,
    p: Float[Tensor, "b m v"],
    q: Float[Tensor, "b n v"],
    tokens: Int[Tensor, "b m"],
    generator: torch.Generator | None = None,
) -> Verdict:
    """Token by token: x_i is kept if u p_i(x_i) < h_i(x_i), u uniform on [0, 1), and the first refusal ends the round.

    Args:
        rule: what h is.
        p, q: rows in float64; n = m + 1. m may be 0.
        tokens: drawn from p, with other numbers than these.
        generator: of m uniforms a row and one race.
    """
    m = tokens.shape[1]
    uniforms = torch.rand(tokens.shape, dtype=p.dtype, device=p.device, generator=generator)
    h = rule.aim(p, q[:, :m], tokens)
    passed = uniforms * chosen(p, tokens) < chosen(h, tokens)
    kept = passed.long().cumprod(1).sum(1)
    weights = at(q, kept)
    if bool((kept < m).any()):
        refused = kept.clamp_max(m - 1)
        left = residual(at(p, refused), weights, at(h, refused))
        weights = torch.where((kept < m)[:, None], left, weights)
    return Verdict(kept, race_winners(weights, race_numbers(weights, generator)))


def accept_block(
    p: Float[Tensor, "b m v"],
    q: Float[Tensor, "b n v"],
    tokens: Int[Tensor, "b m"],
    generator: torch.Generator | None = None,
) -> Verdict:
    """All tokens together: k is the largest i whose coin succeeds, 0 without one.

        c_0 = 1,  c_i = min(1, c_{i-1} q_i(x_i) / p_i(x_i)),  w_i = sum_y (c_i q_{i+1}(y) - p_{i+1}(y))_+
        coin i succeeds with probability w_i / (w_i + 1 - c_i) for i < m (1 where that is 0 / 0), c_m for i = m

    then the token after k < m is drawn from (c_k q_{k+1} - p_{k+1})_+. Arguments as of `accept`. Rows have to advance
    on their own: cutting one back to what another kept would look at what comes later.
    """
    m = tokens.shape[1]
    uniforms = torch.rand(tokens.shape, dtype=p.dtype, device=p.device, generator=generator)
    coins, factors = block_coins(p, q, tokens)
    kept = ((uniforms < coins) * torch.arange(1, m + 1, device=p.device)).amax(1) if m else tokens.sum(1)
    weights = at(q, kept)
    if bool((kept < m).any()):
        refused = kept.clamp_max(m - 1)
        left = residual(at(p, refused), weights, factors.gather(1, refused[:, None]) * weights)
        weights = torch.where((kept < m)[:, None], left, weights)
    return Verdict(kept, race_winners(weights, race_numbers(weights, generator)))


def block_coins(
    p: Float[Tensor, "b m v"], q: Float[Tensor, "b n v"], tokens: Int[Tensor, "b m"]
) -> tuple[Float[Tensor, "b m"], Float[Tensor, "b n"]]:
    """Of block verification: the probability with which each coin succeeds, and c_0 .. c_m."""
    m = tokens.shape[1]
    ratios = chosen(q[:, :m], tokens) / chosen(p, tokens).clamp_min(TINY)
    factors = [torch.ones_like(q[:, 0, 0])]
    for i in range(m):
        factors.append((factors[-1] * ratios[:, i]).clamp_max(1))
    c = torch.stack(factors, 1)
    gained = (c[:, 1:m, None] * q[:, 1:m] - p[:, 1:]).clamp_min(0).sum(-1)
    whole = gained + 1 - c[:, 1:m]
    coins = torch.where(whole > 0, gained / whole.clamp_min(TINY), 1.0)
    return torch.cat([coins, c[:, m:]], 1)[:, :m], c


def accept_coupled(q: Float[Tensor, "b n v"], tokens: Int[Tensor, "b m"], numbers: Float[Tensor, "b n v"]) -> Verdict:
    """Kept while the verifier's race, with the same numbers, has the drafted token for its winner.

    Args:
        q: rows in float64; n = m + 1.
        tokens: the winners of the draft's races with the first m of the numbers, or anything else.
        numbers: of the races at these positions, one vector a position and row.
    """
    winners = race_winners(q, numbers)
    kept = (winners[:, :-1] == tokens).long().cumprod(1).sum(1)
    return Verdict(kept, winners.gather(1, kept[:, None])[:, 0])


def lockstep(verdict: Verdict, tokens: Int[Tensor, "b m"]) -> Verdict:
    """All rows advance as far as the shortest: those that kept more emit as many, and draw the others again.

    Exact for every rule that decides token by token, and not for blocks.
    """
    kept = int(verdict.kept.min())
    if kept == tokens.shape[1]:
        return verdict
    last = torch.where(verdict.kept > kept, tokens[:, kept], verdict.last)
    return Verdict(torch.full_like(verdict.kept, kept), last)


def residual(p: Rows, q: Rows, h: Rows) -> Rows:
    """(h - p)_+ without its sum; q where rounding leaves nothing."""
    left = (h - p).clamp_min(0)
    return torch.where(left.sum(-1, keepdim=True) > 0, left, q)


def at(rows: Float[Tensor, "b n v"], index: Int[Tensor, " b"]) -> Float[Tensor, "b v"]:
    """Of every row of the batch the row of probabilities at its index."""
    return rows[torch.arange(len(rows), device=rows.device), index]


def acceptance(rule: Rule, p: Rows, q: Rows) -> Float[Tensor, "*places"]:
    """The probability that a token drawn from p is kept: sum_n min(p_n, h_n), h that for n."""
    parts = [
        torch.minimum(chosen(p_all, tokens), rule.mass(p_all, q_all, tokens)).sum(-1)
        for p_all, q_all, tokens in _every_token(p, q)
    ]
    return torch.stack(parts).sum(0)


def coupled_acceptance(p: Rows, q: Rows) -> Float[Tensor, "*places"]:
    """The probability that two races with the same numbers have the same winner: sum_i 1 / sum_j max(p_j/p_i, q_j/q_i).

    At least (1 - TV) / (1 + TV).
    """
    parts = []
    for p_all, q_all, tokens in _every_token(p, q):
        p_i, q_i = chosen(p_all, tokens), chosen(q_all, tokens)
        rivals = torch.maximum(p_all * q_i[..., None], q_all * p_i[..., None]).sum(-1)
        parts.append((p_i * q_i / rivals.clamp_min(TINY)).sum(-1))
    return torch.stack(parts).sum(0)


def emitted(rule: Rule, p: Rows, q: Rows) -> Rows:
    """The law of the token that comes out: sum_n p_n (a_n e_n + (1 - a_n) r^(n)), r^(n) the residual after n.

    Of v^2 numbers per row, in pieces.
    """
    law = torch.zeros_like(p)
    for p_all, q_all, tokens in _every_token(p, q):
        h = rule.aim(p_all, q_all, tokens)
        drafted = chosen(p_all, tokens)
        kept = torch.minimum(drafted, chosen(h, tokens))
        left = residual(p_all, q_all, h)
        refused = (drafted - kept)[..., None] * left / left.sum(-1, keepdim=True)
        law = (law + refused.sum(-2)).scatter_add(-1, tokens, kept)
    return law


def divergence(h: Rows, q: Rows) -> Float[Tensor, "*places"]:
    """KL(h, q) = sum_i h_i ln(h_i / q_i) in nats; infinite where h has mass that q has not."""
    return (torch.special.xlogy(h, h) - torch.special.xlogy(h, q)).sum(-1)


def _every_token(p: Rows, q: Rows) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Rows (*places, n, v) and the tokens (*places, n) that may have been drafted, all v of them in pieces."""
    v = p.shape[-1]
    size = max(1, LAW_NUMBERS // max(1, p.numel()))
    for tokens in torch.arange(v, device=p.device).split(size):
        shape = (*p.shape[:-1], len(tokens), v)
        yield p[..., None, :].expand(shape), q[..., None, :].expand(shape), tokens.expand(shape[:-1])
