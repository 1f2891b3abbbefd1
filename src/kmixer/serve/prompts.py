"""Prompts that are read: piece by piece, in turn, from where somebody has read already; with scores where asked."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kmixer.data.tokenizers import Tokenizer
from kmixer.generation.kept_states import BLOCK, KeptStates, names_of_blocks
from kmixer.generation.reading import PromptReader
from kmixer.models.causal_lm import CausalLM
from kmixer.serve.jobs import Job, Likeliest, Scored
from kmixer.serve.sessions import Standing
from kmixer.state import State

# Tokens after which another prompt has its turn, where several are read.
READ_IN_A_ROW = 256


@dataclass(eq=False)
class Prompt:
    """A job's prompt, and how far it is read. At its end `state` and `logits` are those after what was read."""

    job: Job
    tokens: Tensor  # with those that its session has not read yet
    state: State
    position: int  # of the state
    read: int = 0  # of the tokens
    cached: int = 0
    blocks: list[bytes] = field(default_factory=list)  # names of what is kept or to be kept
    scores: list[tuple[float, Likeliest]] = field(default_factory=list)
    logits: Tensor | None = None  # (v,), after the last token; None where nothing is to be drawn
    begun: float = field(default_factory=time.perf_counter)

    @property
    def last(self) -> int:
        """Tokens that are to be read: what nobody needs the logits after stays unread."""
        return len(self.tokens) if self.job.max_tokens else max(0, len(self.tokens) - 1)

    def scored(self, tokenizer: Tokenizer) -> tuple[Scored, ...]:
        """The prompt's own tokens, with what they score."""
        if not self.job.score:
            return ()
        own = self.job.tokens
        scores: list[tuple[float | None, Likeliest]] = [(None, ()), *self.scores]
        decoder = tokenizer.decoder()
        for token in () if self.job.begin is None else self.job.begin.tail:
            decoder(token)
        scored, offset = [], 0
        for token, (logprob, top) in zip(own, scores[len(scores) - len(own) :], strict=True):
            scored.append(Scored(token, offset, logprob, top))
            offset += len(decoder(token))
        return tuple(scored)


class Prompts:
    """All that are read: one at a time for READ_IN_A_ROW tokens, then the next.

    Args:
        model: in evaluation mode.
        prepared: whether a prepared decoder reads, or the model itself; then no states are kept.
        prefix_memory: bytes of kept states of prefixes.
    """

    def __init__(self, model: CausalLM, *, prepared: bool, prefix_memory: int) -> None:
        self._initial = model.initial_state(1)
        self._reader = PromptReader(model, self._initial, prepared=prepared)
        self._prepared = prepared
        self.prefixes: KeptStates[State] = KeptStates(prefix_memory if prepared else 0)
        self._line: deque[Prompt] = deque()
        self._at: Prompt | None = None  # where the reader stands

    def __bool__(self) -> bool:
        return bool(self._line)

    @property
    def jobs(self) -> list[Job]:
        """Whose prompts are being read."""
        return [prompt.job for prompt in list(self._line)]

    def add(self, job: Job) -> None:
        begin = job.begin or Standing(self._initial)
        tokens = torch.tensor((*begin.unread, *job.tokens), dtype=torch.int64)
        prompt = Prompt(job, tokens, begin.state, begin.position)
        if not begin.tokens and self._prepared and not job.score:
            prompt.blocks = names_of_blocks(tokens[: max(0, len(tokens) - 1)].numpy())
        self._line.append(prompt)

    def drop_cancelled(self) -> None:
        self._line = deque(prompt for prompt in self._line if not prompt.job.cancelled)

    def clear(self) -> None:
        self._line.clear()

    def read(self, tokens: int) -> Iterator[Prompt]:
        """Read so many tokens, up to the end of a piece more; the prompts that end with them."""
        while self._line and tokens > 0:
            prompt = self._line[0]
            if self._at is not prompt:
                self._go_on_from_known(prompt)
                self._reader.decoder.restore(prompt.state)
                self._at = prompt
            while tokens > 0 and prompt.read < prompt.last:
                tokens -= self._piece(prompt)
                if prompt.position % READ_IN_A_ROW == 0:
                    break
            ended = prompt.read >= prompt.last
            if ended or (prompt.position % READ_IN_A_ROW == 0 and len(self._line) > 1):
                prompt.state = self._reader.decoder.state()
                self._at = None
                self._line.rotate(-1)
            if ended:
                yield prompt
                self._line.pop()  # now: where it is taken in vain, it is among those that are told of the error

    def _go_on_from_known(self, prompt: Prompt) -> None:
        """Go to where somebody has read already."""
        count, state = self.prefixes.longest(prompt.blocks)
        if count * BLOCK > prompt.read:
            prompt.cached += count * BLOCK - prompt.read
            prompt.read = prompt.position = count * BLOCK
            prompt.state = state

    def _piece(self, prompt: Prompt) -> int:
        """Read one piece; how many tokens it had."""
        n = self._reader.length(prompt.position, prompt.last - prompt.read)
        tokens = prompt.tokens[prompt.read : prompt.read + n]
        logits = self._reader.read(tokens[None])[0]
        if prompt.job.score:
            following = prompt.tokens[prompt.read + 1 : prompt.read + n + 1]
            prompt.scores += scores_of(logits[: len(following)], following, prompt.job.top or 0)
        prompt.read += n
        prompt.position += n
        if prompt.read == len(prompt.tokens):
            prompt.logits = logits[-1].float()
        if prompt.blocks and prompt.position % BLOCK == 0 and prompt.position // BLOCK <= len(prompt.blocks):
            self.prefixes.put(prompt.blocks[prompt.position // BLOCK - 1], self._reader.decoder.state())
        return n


def scores_of(logits: Tensor, tokens: Tensor, top: int | None) -> list[tuple[float, Likeliest]]:
    """Of tokens (n,) after logits (n, v): log-probability, and the likeliest tokens."""
    logprobs = torch.log_softmax(logits.double(), -1)
    chosen = logprobs.gather(-1, tokens[:, None])[:, 0].tolist()
    if not top:
        return [(logprob, ()) for logprob in chosen]
    likeliest = logprobs.topk(min(top, logprobs.shape[-1]), -1)
    pairs = zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
    return [(logprob, tuple(zip(*pair, strict=True))) for logprob, pair in zip(chosen, pairs, strict=True)]
