"""A conversation: lines of a user and continuations of a model, in turn, from a state that is carried on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kmixer.data.tokenizers import Tokenizer
from kmixer.errors import InputError
from kmixer.generation.sampling import Sampling
from kmixer.generation.streaming import decoded_after, generate_tokens, until
from kmixer.layers.adapting import check_stream
from kmixer.models.causal_lm import CausalLM
from kmixer.state import State


class Conversation:
    """A text that a user and a model write in turn, in lines, with the state carried.

    Args:
        model: in evaluation mode.
        tokenizer: of the model.
        sampling: how tokens are drawn.
        max_new_tokens: the most that the model writes after a line.
        seed: of what is drawn after the first line, one more for each later one; None draws afresh.
        stop: texts before which an answer ends.

    Raises InputError for a model that cannot read without end, see `check_stream`.
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Tokenizer,
        sampling: Sampling,
        max_new_tokens: int,
        seed: int | None = None,
        stop: Sequence[str] = (),
    ) -> None:
        check_stream(model)
        self._model, self._tokenizer = model, tokenizer
        self._sampling, self._max_new_tokens, self._stop = sampling, max_new_tokens, [text for text in stop if text]
        self._seed = seed
        self._state: State = None
        self._break = "" if self._tokenizer.unknown("\n") else "\n"

    def continue_line(self, line: str) -> Iterator[str]:
        """What the model writes after this line, in pieces; both become part of what it has read.

        Raises InputError for signs that the tokenizer does not know; the line then counts for nothing.
        """
        if unknown := self._tokenizer.unknown(line):
            raise InputError(f"the tokenizer does not know {', '.join(map(repr, unknown))}")
        given = line if self._state is None else self._break + line
        tokens = torch.from_numpy(self._tokenizer.encode(given))[None]
        if tokens.numel() == 0:
            raise InputError(f"in {line!r} this tokenizer sees no token")
        drawn: list[Tensor] = []
        yield from until(self._pieces(tokens, drawn), self._stop)
        with torch.no_grad():
            self._state = self._model(
                torch.cat([tokens, *(column[:, None] for column in drawn)], dim=1), self._state
            ).state
        if self._seed is not None:
            self._seed += 1

    def _pieces(self, tokens: Tensor, drawn: list[Tensor]) -> Iterator[str]:
        columns = generate_tokens(
            self._model, tokens, self._max_new_tokens, self._sampling, seed=self._seed, state=self._state
        )
        return decoded_after(tokens, _noted(columns, drawn), self._tokenizer)


def _noted(columns: Iterator[Tensor], drawn: list[Tensor]) -> Iterator[Tensor]:
    for column in columns:
        drawn.append(column)
        yield column
