"""Drafts: what proposes tokens for a verifier to check.

    draft.start(prompt)                      all of the prompt (b, t), of which the last token is pending
    tokens, rows = draft.propose(m, draw)    (b, n) and (b, n, v), n <= m; rows are None where they are one-hot
    draft.commit(kept, last)                 of those tokens the first `kept` (b,) of a row stand, and `last` (b,) after

`draw(logits, i)` gives the token (b,) at index i of the round, drawn from logits (b, v), and the row (b, v) that it was
drawn from: `Draws.draft` of `kmixer.generation.draws`, which knows temperature, filters and random numbers.

How many tokens are proposed may depend on all that was drawn before, and each of them has to be verified.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from kmixer.errors import InputError
from kmixer.generation.chunks import open_reader
from kmixer.generation.ngrams import Ngrams
from kmixer.generation.streaming import before_last
from kmixer.models.causal_lm import CausalLM

Draw = Callable[[Tensor, int], tuple[Tensor, Tensor]]
Proposal = tuple[Tensor, Tensor | None]
KINDS = ("char", "byte", "bpe", "sentencepiece")


class Draft(Protocol):
    """What all drafts have in common."""

    def start(self, prompt: Int[Tensor, "b t"]) -> None: ...

    def propose(self, count: int, draw: Draw) -> Proposal: ...

    def commit(self, kept: Int[Tensor, " b"], last: Int[Tensor, " b"]) -> None: ...


class NgramDraft:
    """The next token by counts of a text; needs neither training nor a state.

    Args:
        ngrams: with the tokens of the verifier, see `check_same_tokens`.
    """

    def __init__(self, ngrams: Ngrams) -> None:
        self._ngrams, self._length = ngrams, ngrams.order - 1

    def start(self, prompt: Int[Tensor, "b t"]) -> None:
        self._device = prompt.device
        self._contexts = [self._cut(row) for row in prompt.tolist()]

    def propose(self, count: int, draw: Draw) -> Proposal:
        contexts = [list(context) for context in self._contexts]
        proposed, drawn_from = [], []
        for i in range(count):
            logits = np.log(np.stack([self._ngrams.row(context) for context in contexts]))
            tokens, row = draw(torch.from_numpy(logits).to(self._device), i)
            for context, token in zip(contexts, tokens.tolist(), strict=True):
                context.append(token)
            proposed.append(tokens)
            drawn_from.append(row)
        if not proposed:
            self._proposed = torch.zeros(len(contexts), 0, dtype=torch.int64, device=self._device)
            return self._proposed, None
        self._proposed = torch.stack(proposed, 1)
        return self._proposed, torch.stack(drawn_from, 1)

    def commit(self, kept: Int[Tensor, " b"], last: Int[Tensor, " b"]) -> None:
        standing = _standing(self._proposed, kept, last)
        self._contexts = [self._cut(old + new) for old, new in zip(self._contexts, standing, strict=True)]

    def _cut(self, tokens: list[int]) -> list[int]:
        return tokens[max(0, len(tokens) - self._length) :]


class LookupDraft:
    """What followed the last time that the latest tokens of a row were seen, in its prompt and its output.

    The longest match counts, of max_match down to min_match tokens; what follows it may run into the proposal itself,
    so that a text which repeats goes on repeating. Without a match nothing is proposed: a plain step.

    Args:
        max_match, min_match: tokens of a match, at most and at least.
        lockstep: propose nothing where one row has no match, as rows that advance together would keep nothing;
            otherwise rows without one are filled up.
    """

    def __init__(self, max_match: int = 4, min_match: int = 2, *, lockstep: bool = True) -> None:
        if not 1 <= min_match <= max_match:
            raise InputError(
                f"min_match, max_match: got {min_match}, {max_match}; allowed: 1 <= min_match <= max_match"
            )
        self._sizes, self._lockstep = range(max_match, min_match - 1, -1), lockstep

    def start(self, prompt: Int[Tensor, "b t"]) -> None:
        self._device = prompt.device
        self._texts = [_IndexedText(row, self._sizes) for row in prompt.tolist()]

    def propose(self, count: int, draw: Draw) -> Proposal:
        following = [text.following(count) for text in self._texts]
        matched = [tokens is not None for tokens in following]
        if not (all(matched) if self._lockstep else any(matched)):
            count = 0
        tokens = [row[:count] if row is not None else [0] * count for row in following]
        self._proposed = torch.tensor(tokens, dtype=torch.int64, device=self._device).view(len(tokens), count)
        return self._proposed, None

    def commit(self, kept: Int[Tensor, " b"], last: Int[Tensor, " b"]) -> None:
        for text, tokens in zip(self._texts, _standing(self._proposed, kept, last), strict=True):
            text.extend(tokens)


class _IndexedText:
    """A text with the place after the latest occurrence of each of its n-grams, but for those at its end."""

    def __init__(self, tokens: list[int], sizes: range) -> None:
        self._sizes = sizes  # from the longest
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}
        self.extend(tokens)

    def extend(self, tokens: list[int]) -> None:
        for token in tokens:
            end = len(self._tokens)
            for size in self._sizes:
                if size <= end:
                    self._after[tuple(self._tokens[end - size :])] = end
            self._tokens.append(token)

    def following(self, count: int) -> list[int] | None:
        """So many tokens after the latest occurrence of the longest known end of the text; None without one."""
        end = len(self._tokens)
        for size in self._sizes:
            start = self._after.get(tuple(self._tokens[max(0, end - size) :]))
            if start is not None and size <= end:
                period = end - start
                return [self._tokens[start + i % period] for i in range(count)]
        return None


class ModelDraft:
    """Another model, of any kind, with equal tokens; a small K-Stack is the fastest.

    Args:
        model: in evaluation mode; it must go on for ever.

    Raises InputError for a model in training mode, or one that ends at a window.
    """

    def __init__(self, model: CausalLM) -> None:
        if model.training:
            raise InputError("draft: got a model in training mode; call draft.eval() first")
        if (limit := model.config.max_positions) is not None:
            raise InputError(
                f"draft: {model.config.limited_by} ends at {limit} positions; give a draft that streams, "
                "for example one with a conv base kernel"
            )
        self._model = model

    def start(self, prompt: Int[Tensor, "b t"]) -> None:
        self._reader = open_reader(self._model, before_last(self._model, prompt))
        self._pending = prompt[:, -1:]

    def propose(self, count: int, draw: Draw) -> Proposal:
        """Reads the pending token and what it proposed again for every further one: a chunk costs little more than a
        step, and nothing has to be restored when it is refused."""
        self._round, drawn_from = self._pending, []
        for i in range(count):
            tokens, row = draw(self._reader.read(self._round)[:, -1], i)
            self._round = torch.cat([self._round, tokens[:, None]], 1)
            drawn_from.append(row)
        return self._round[:, 1:], torch.stack(drawn_from, 1) if drawn_from else None

    def commit(self, kept: Int[Tensor, " b"], last: Int[Tensor, " b"]) -> None:
        """Afterwards the state stands before `last`, having read the pending token and the kept ones."""
        self._pending = last[:, None]
        drafted = self._round.shape[1] - 1
        if not drafted or int(kept.max()) == drafted:  # the last token was not read
            self._reader.read(self._round)
        self._reader.commit(kept + 1)


def check_same_tokens(
    tokenizer: dict[str, Any] | None, vocabulary_size: int, drafts: dict[str, Any] | None, drafts_size: int
) -> None:
    """Raises InputError where the tokens of a verifier and its draft are not the same.

    Args:
        tokenizer, drafts: of both, as `Tokenizer.to_json` gives it; where one is None, sizes alone are compared.
        vocabulary_size, drafts_size: of both.
    """
    different = tokenizer is not None and drafts is not None and tokenizer != drafts
    if different or vocabulary_size != drafts_size:
        raise InputError(
            f"draft: it has other tokens ({_described(drafts, drafts_size)}) than the model "
            f"({_described(tokenizer, vocabulary_size)}); give a draft made with the model's tokenizer"
        )


def _described(tokenizer: dict[str, Any] | None, size: int) -> str:
    kind = (tokenizer or {}).get("kind")
    return f"{kind + ', ' if isinstance(kind, str) and kind in KINDS else ''}{size:,} tokens"


def _standing(proposed: Tensor, kept: Tensor, last: Tensor) -> list[list[int]]:
    """The tokens of a round that stand, by row."""
    both = zip(proposed.tolist(), kept.tolist(), last.tolist(), strict=True)
    return [[*tokens[:count], token] for tokens, count, token in both]
