"""The random numbers of speculative decoding: what a draft draws with, and the verdict on what it drew.

    draws = open_draws(speculation, sampling, seeded generator)
    tokens, rows = draws.draft(logits, i)             the draft's token i of this round (0 .. m - 1)
    verdict = draws.judge(p, q, tokens)               after all m; p of None is one-hot at the tokens
    draws.emitted(verdict.kept + 1)                   the next round begins behind them
    tokens = draws.plain(logits)                      a round without draft: drawn, and emitted

`FreshDraws` draws the numbers of a round in a fixed order: m races of the draft, m uniforms a row, one race more.
`SharedDraws` has one race a position of the text, in which draft and verifier take part; it draws them in the order of
positions, as plain generation does, and keeps what it drew for positions that were not emitted.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from kmixer.generation.acceptance import Verdict, accept, accept_block, accept_coupled
from kmixer.generation.rules import Exact, Rule
from kmixer.generation.sampling import Sampling, one_hot, race_numbers, race_winners
from kmixer.generation.speculation import Speculation


class Draws(Protocol):
    """What the rules have in common."""

    def draft(self, logits: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """The draft's token (b,) at this index of the round, and the row (b, v) that it was drawn from."""
        ...

    def judge(self, p: Tensor | None, q: Tensor, tokens: Tensor) -> Verdict:
        """Which of the drafted tokens (b, m) are kept, given rows p (b, m, v) and q (b, m + 1, v) in float64."""
        ...

    def emitted(self, count: Tensor) -> None:
        """So many tokens (b,) of every row were emitted."""
        ...

    def plain(self, logits: Tensor) -> Tensor:
        """The next tokens (b,) where nothing was drafted, from logits (b, v); they are emitted."""
        ...


class FreshDraws:
    """Numbers of a round that no other round uses, for `accept` with a rule and, with None, for `accept_block`."""

    def __init__(self, rule: Rule | None, sampling: Sampling, generator: torch.Generator) -> None:
        self._rule, self._sampling, self._generator = rule, sampling, generator

    def draft(self, logits: Tensor, index: int) -> tuple[Tensor, Tensor]:
        rows = self._sampling.rows(logits)
        return race_winners(rows, race_numbers(rows, self._generator)), rows

    def judge(self, p: Tensor | None, q: Tensor, tokens: Tensor) -> Verdict:
        if p is None:
            p = one_hot(tokens, q.shape[-1])
        if self._rule is None:
            return accept_block(p, q, tokens, self._generator)
        return accept(self._rule, p, q, tokens, self._generator)

    def emitted(self, count: Tensor) -> None:
        pass

    def plain(self, logits: Tensor) -> Tensor:
        return self._sampling(logits, self._generator)


class SharedDraws:
    """One race a position, drawn ahead as far as a draft comes, for `accept_coupled`."""

    def __init__(self, sampling: Sampling, generator: torch.Generator) -> None:
        self._sampling, self._generator = sampling, generator
        self._races: list[Tensor] = []  # (b, v), of positions from `_first` on
        self._first = 0
        self._positions: list[int] = []  # of every row, how many tokens it has emitted

    def draft(self, logits: Tensor, index: int) -> tuple[Tensor, Tensor]:
        rows = self._sampling.rows(logits)
        return race_winners(rows, self._numbers(rows, index)), rows

    def judge(self, p: Tensor | None, q: Tensor, tokens: Tensor) -> Verdict:
        numbers = torch.stack([self._numbers(q[:, i], i) for i in range(q.shape[1])], 1)
        return accept_coupled(q, tokens, numbers)

    def emitted(self, count: Tensor) -> None:
        self._positions = [
            position + n for position, n in zip(self._positions or [0] * len(count), count.tolist(), strict=True)
        ]
        passed = min(self._positions) - self._first
        del self._races[:passed]
        self._first += passed

    def plain(self, logits: Tensor) -> Tensor:
        if self._races:
            rows = self._sampling.rows(logits)
            tokens = race_winners(rows, self._numbers(rows, 0))
            self.emitted(torch.ones_like(tokens))
            return tokens
        # Nothing was drawn ahead, so that all rows stand at one position: what plain generation does.
        self._positions = [position + 1 for position in self._positions or [0] * len(logits)]
        self._first += 1
        return self._sampling(logits, self._generator)

    def _numbers(self, like: Tensor, index: int) -> Tensor:
        """Of the race (b, v) at this index of the round, rows at their own positions."""
        positions = self._positions or [0] * len(like)
        while self._first + len(self._races) <= max(positions) + index:
            self._races.append(race_numbers(torch.empty_like(like), self._generator))
        if min(positions) == max(positions):
            return self._races[index]
        return torch.stack([self._races[position + index - self._first][row] for row, position in enumerate(positions)])


def open_draws(speculation: Speculation, sampling: Sampling, generator: torch.Generator) -> Draws:
    """The draws of these settings. At temperature 0 nothing is left to chance: every rule keeps a token iff it is q's.

    A generator for this decoding alone: what else is drawn from it changes the text.
    """
    if sampling.temperature == 0:
        return FreshDraws(Exact(), sampling, generator)
    if speculation.rule == "coupled":
        return SharedDraws(sampling, generator)
    return FreshDraws(speculation.token_rule(), sampling, generator)
