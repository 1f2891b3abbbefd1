"""What the engine is asked for, and what it answers: a job, its choices, and the pieces of their texts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from kmixer.data.tokenizers import StreamDecoder, Tokenizer
from kmixer.generation.sampling import Sampling
from kmixer.generation.streaming import StoppedText
from kmixer.serve.sessions import TAIL, Standing

Finish = Literal["stop", "length"]
Likeliest = tuple[tuple[int, float], ...]  # tokens and log-probabilities


@dataclass(frozen=True)
class Scored:
    """A token of an answer: where in the answer's text it begins, its log-probability, and the likeliest in its place.

    The first token of all has neither.
    """

    token: int
    offset: int
    logprob: float | None
    top: Likeliest = ()


@dataclass(frozen=True)
class Piece:
    """Text of a choice, up to a batch of tokens; with the last piece, why it ended and how many tokens it has."""

    choice: int
    text: str = ""
    scored: tuple[Scored, ...] = ()
    finish: Finish | None = None
    tokens: int = 0


@dataclass(frozen=True)
class PromptRead:
    """Comes first: tokens of the prompt, of them taken from kept states, and what they score where that was asked."""

    tokens: int
    cached: int
    scored: tuple[Scored, ...] = ()


@dataclass(frozen=True)
class Ended:
    """Comes last: where the text stands, for a session; or what went wrong."""

    standing: Standing | None = None
    error: str | None = None


Event = PromptRead | Piece | Ended


@dataclass(eq=False)
class Job:
    """A prompt to be continued, in as many ways as there are seeds.

    Args:
        tokens: of the prompt; after those that the session has not read yet.
        max_tokens: of every choice; 0 reads the prompt.
        seeds: of the choices.
        top: how many likeliest tokens are told in the place of each, and its log-probability; None: neither.
        score: whether the prompt's tokens are told like this too.
        begin: where a session stands; None at the beginning of a text.
        deliver: takes the events, one after the other, on whatever thread `Engine.publish` lets it.
    """

    tokens: tuple[int, ...]
    max_tokens: int
    sampling: Sampling
    seeds: tuple[int, ...]
    deliver: Callable[[Event], None]
    stop: tuple[str, ...] = ()
    top: int | None = None
    score: bool = False
    begin: Standing | None = None
    cancelled: bool = field(default=False, init=False)


class Choice:
    """One way that a prompt is continued: its tokens so far, and the text that they are known to give."""

    def __init__(self, job: Job, index: int, tokenizer: Tokenizer, tail: tuple[int, ...]) -> None:
        self.job, self.index = job, index
        self.left = job.max_tokens
        self.tokens: list[int] = []
        self.finish: Finish | None = None
        self.kept = 0  # tokens before a stop text
        self._decoder: StreamDecoder = tokenizer.decoder()
        for token in tail:
            self._decoder(token)
        self._until = StoppedText(job.stop)
        self._decoded = self._released = 0  # characters
        self._ends: list[int] = []  # of the tokens in the text, where a stop text may end it
        self._scored: list[Scored] = []  # not sent yet

    def take(self, tokens: list[int], scores: list[tuple[float, Likeliest]]) -> str:
        """The text that these tokens complete, those after the end of the choice left out."""
        if not self.job.stop and not scores:
            return self._take_all(tokens[: self.left])
        ready = []
        for index, token in enumerate(tokens):
            if scores:
                self._scored.append(Scored(token, self._decoded, *scores[index]))
            piece = self._decoder(token)
            self._decoded += len(piece)
            self.tokens.append(token)
            if self.job.stop:
                self._ends.append(self._decoded)
            self.left -= 1
            ready.append(self._until(piece))
            if not self.left and not self._until.stopped:
                ready.append(self._until(self._decoder.end()) + self._until.end())
            if self._until.stopped or not self.left:
                break
        text = "".join(ready)
        self._released += len(text)
        if self._until.stopped:
            self.finish, self.kept = "stop", sum(end <= self._released for end in self._ends)
        elif not self.left:
            self.finish, self.kept = "length", len(self.tokens)
        return text

    def _take_all(self, tokens: list[int]) -> str:
        """The same, where nothing but their number ends the choice."""
        self.tokens += tokens
        self.left -= len(tokens)
        text = "".join(map(self._decoder, tokens))
        if not self.left:
            text += self._decoder.end()
            self.finish, self.kept = "length", len(self.tokens)
        return text

    def scored(self) -> tuple[Scored, ...]:
        """Of the tokens whose text is sent, those that were not told before."""
        ended = self.finish == "length"
        sent = [one for one in self._scored if ended or one.offset < self._released]
        self._scored = [] if self.finish else self._scored[len(sent) :]
        return tuple(sent)

    def kept_tokens(self, tokenizer: Tokenizer, answer: str) -> tuple[int, ...]:
        """The tokens of the answer's text, where a stop text ended it."""
        end = self._ends[self.kept - 1] if self.kept else 0
        rest = answer[end:]
        known = rest and not tokenizer.unknown(rest)
        return (*self.tokens[: self.kept], *(tokenizer.encode(rest).tolist() if known else ()))


def tail_of(*parts: tuple[int, ...]) -> tuple[int, ...]:
    """The last tokens of a text that comes in parts."""
    return tuple(token for part in parts for token in part[-TAIL:])[-TAIL:]
