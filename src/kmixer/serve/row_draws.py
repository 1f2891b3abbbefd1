"""The next token of every row, each drawn with a generator of its own: what `Sampling` draws of that row alone."""

from __future__ import annotations

import torch
from torch import Tensor

from kmixer.errors import InputError
from kmixer.generation.sampling import Sampling, as_settings, draw_numbers, draws_are_known, race
from kmixer.native import kernels

# Random numbers drawn ahead at once, of all rows together.
AHEAD, NUMBERS = 64, 1 << 22


class RowDraws:
    """Draws for rows that come and go.

    Args:
        capacity: rows.
        vocabulary_size: v.
    """

    def __init__(self, capacity: int, vocabulary_size: int) -> None:
        self._known = kernels() is not None and draws_are_known()
        ahead = max(1, min(AHEAD, NUMBERS // (capacity * vocabulary_size))) if self._known else 1
        self._numbers = torch.zeros(ahead, capacity, vocabulary_size, dtype=torch.int64)
        self._settings = torch.zeros(capacity, 3, dtype=torch.float64)
        self._samplings = [Sampling(0.0)] * capacity
        self._generators: list[torch.Generator | None] = [None] * capacity
        self._turn = 0  # of those that numbers were drawn ahead for
        self.tokens = torch.zeros(capacity, dtype=torch.int64)

    def put(self, row: int, sampling: Sampling, generator: torch.Generator) -> None:
        """Let a row be drawn by these settings from its next token on."""
        self._samplings[row] = sampling
        self._generators[row] = None if sampling.temperature == 0 else generator
        self._settings[row] = torch.tensor(as_settings(sampling), dtype=torch.float64)
        self._fill(row)

    def move(self, source: int, target: int) -> None:
        """Let a row be drawn as another is, which has ended."""
        self._samplings[target], self._generators[target] = self._samplings[source], self._generators[source]
        self._settings[target] = self._settings[source]
        self._numbers[:, target] = self._numbers[:, source]
        self.tokens[target] = self.tokens[source]

    def __call__(self, logits: Tensor) -> list[int]:
        """Draw tokens (n,) for the first n rows, from logits (n, v); the rows whose logits are no distribution."""
        n = len(logits)
        tokens = self.tokens[:n]
        if self._known and logits.dtype == torch.float32 and logits.is_contiguous():
            if self._turn == len(self._numbers):
                self._turn = 0
                for row in range(n):
                    self._fill(row)
            race(logits, self._numbers[self._turn, :n], self._settings[:n], tokens)
            self._turn += 1
            undecided = [] if min(tokens.tolist()) >= 0 else (tokens < 0).nonzero()[:, 0].tolist()
        else:
            undecided = list(range(n))
        return [row for row in undecided if not self._draw(row, logits[row : row + 1])]

    def _draw(self, row: int, logits: Tensor) -> bool:
        """Draw one row by the definition; whether that can be."""
        sampling = self._samplings[row]
        try:
            if self._known and sampling.temperature > 0 and logits.dtype == torch.float32:
                numbers = self._numbers[self._turn - 1, row : row + 1]
                self.tokens[row] = sampling.by_definition(logits, numbers)[0]
            else:
                self.tokens[row] = sampling(logits, self._generators[row])[0]
        except InputError:
            self.tokens[row] = 0
            return False
        return True

    def _fill(self, row: int) -> None:
        """Draw the numbers of the turns to come."""
        generator, to = self._generators[row], self._numbers[self._turn :, row]
        if self._known and generator is not None and len(to):
            to.copy_(draw_numbers(to.shape, generator))
