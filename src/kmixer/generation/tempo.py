"""How many tokens a round drafts: as many as were asked for, or as many as pay by measured costs.

A round of m tokens that reads m + 1 costs read(m + 1) + m c + o seconds and emits E tokens per row:

    E = 1 + a + ... + a^m,    gain = E plain / (read(m + 1) + m c + o)

with a the acceptance, c the seconds of one drafted token, o those of the rule and of going back, and plain those of a
token without draft. It depends on rounds that are past, so that no rule's law changes.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from jaxtyping import Int
from torch import Tensor

from kmixer.generation.decoder import Decoder
from kmixer.generation.sampling import Sampling, race_numbers, race_winners

LARGEST = 16  # tokens that a round drafts of itself
FIRST = 4  # before anything is known
ROUNDS_TO_LEARN = 8
PAYS = 1.05  # below, rounds are not worth their noise
REMEMBERED = 15  # rounds whose median is a cost
FORGETS = 0.98  # the weight of what was kept, a round later
CALLS = 3  # of which the fastest is the time


@dataclass(frozen=True)
class Costs:
    """Seconds of a token without draft, and of reading n tokens, by n."""

    plain: float
    read: dict[int, float]

    def of_read(self, n: int) -> float:
        """Of any n, between those measured."""
        if n in self.read:
            return self.read[n]
        below = max((k for k in self.read if k < n), default=min(self.read))
        above = min((k for k in self.read if k > n), default=max(self.read))
        if above == below:
            return self.read[below] * n / below
        return self.read[below] + (self.read[above] - self.read[below]) * (n - below) / (above - below)


def measure_costs(reader: Decoder, pending: Int[Tensor, " b"], sampling: Sampling, counts: Iterable[int]) -> Costs:
    """Time a reader where it stands, which it leaves as it was; reads of so many tokens, and a step and a draw."""
    here = reader.state()

    def plain() -> None:
        rows = sampling.rows(reader.step(pending))
        race_winners(rows, race_numbers(rows, torch.Generator(rows.device)))

    seconds = _fastest(plain)
    reader.restore(here)
    read = {n: _fastest(partial(reader.read, pending[:, None].repeat(1, n))) for n in counts}
    reader.restore(here)
    return Costs(seconds, read)


def _fastest(call: Callable[[], object]) -> float:
    seconds = []
    for _ in range(CALLS):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def expected_tokens(acceptance: float, m: int) -> float:
    """E above: tokens that a round emits."""
    return sum(acceptance**i for i in range(m + 1))


def gain_of(costs: Costs, m: int, acceptance: float, draft: float, overhead: float) -> float:
    """Speed of rounds of m drafted tokens over that of plain decoding; draft is c and overhead is o above."""
    return expected_tokens(acceptance, m) * costs.plain / (costs.of_read(m + 1) + m * draft + overhead)


class Tempo(Protocol):
    """Chooses m, round by round."""

    note: str | None  # what the user should know
    plain_seconds: float | None  # of a token without draft, where they were measured

    def tokens(self) -> int:
        """Of the next round; 0 from now on where drafting does not pay."""
        ...

    def learn(self, kept: int, refused: int, drafted: int, draft: float, overhead: float) -> None:
        """What came of a round: tokens kept and refused, of how many; seconds of the draft, of rule and rollback."""
        ...


class FixedTempo:
    """The same number always."""

    def __init__(self, tokens: int) -> None:
        self.note: str | None = None
        self.plain_seconds: float | None = None
        self._tokens = tokens

    def tokens(self) -> int:
        return self._tokens

    def learn(self, kept: int, refused: int, drafted: int, draft: float, overhead: float) -> None:
        pass


class MeasuredTempo:
    """What pays most, of 1 to 16 tokens, by costs and by what was kept so far; none where nothing pays.

    Args:
        costs: of the verifier.
    """

    def __init__(self, costs: Costs) -> None:
        self.note: str | None = None
        self.plain_seconds: float | None = costs.plain
        self._costs = costs
        self._kept = self._refused = 0.0
        self._draft: deque[float] = deque(maxlen=REMEMBERED)
        self._overhead: deque[float] = deque(maxlen=REMEMBERED)
        self._rounds, self._tokens = 0, FIRST
        best, gain = self._best(acceptance=1.0)
        if gain < PAYS:
            self._give_up(best, gain)

    def tokens(self) -> int:
        return self._tokens

    def learn(self, kept: int, refused: int, drafted: int, draft: float, overhead: float) -> None:
        if drafted == 0 or self._tokens == 0:
            return
        self._kept, self._refused = FORGETS * self._kept + kept, FORGETS * self._refused + refused
        self._draft.append(draft / drafted)
        self._overhead.append(overhead)
        self._rounds += 1
        if self._rounds % ROUNDS_TO_LEARN == 0:
            best, gain = self._best(self._kept / max(1.0, self._kept + self._refused))
            if gain < PAYS:
                self._give_up(best, gain)
            else:
                self._tokens = best

    def _best(self, acceptance: float) -> tuple[int, float]:
        draft = statistics.median(self._draft) if self._draft else 0.0
        overhead = statistics.median(self._overhead) if self._overhead else 0.0
        gains = {m: gain_of(self._costs, m, acceptance, draft, overhead) for m in range(1, LARGEST + 1)}
        best = max(gains, key=gains.__getitem__)
        return best, gains[best]

    def _give_up(self, best: int, gain: float) -> None:
        self._tokens = 0
        after = f"after {self._rounds} rounds" if self._rounds else "from the start, whatever were kept"
        self.note = (
            f"drafting does not pay here: measured costs promise {gain:.2f} times the speed of plain decoding at most, "
            f"with {best} tokens a round; decoded plainly {after}"
        )
