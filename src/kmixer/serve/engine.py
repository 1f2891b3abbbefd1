"""The engine: a thread that reads prompts and writes answers, rows of one prepared step for all that are written.

    turn: take what was asked for; read some tokens of a prompt; draw a token for every row, and step

An answer depends on model, prompt, settings and seed alone, bit for bit, whatever else runs and whatever is kept: rows
of `RowDecoder` do not depend on each other, prompts are read in pieces whose ends depend on positions alone, states of
prefixes stand where every reading stops, and every choice has a random generator of its own. It knows no HTTP.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from kmixer.data.tokenizers import Tokenizer
from kmixer.errors import InputError, one_line
from kmixer.generation.rows import EagerRow, RowDecoder, Rows, why_not_rows
from kmixer.generation.streaming import seeded_generator
from kmixer.models.causal_lm import CausalLM
from kmixer.serve.jobs import Choice, Ended, Event, Job, Likeliest, Piece, PromptRead, tail_of
from kmixer.serve.prompts import READ_IN_A_ROW, Prompt, Prompts, scores_of
from kmixer.serve.row_draws import RowDraws
from kmixer.serve.sessions import Standing

# Tokens of prompts that are read in a turn while answers are written: so many take about the time of a full step.
READ_A_TURN = 64
# Turns after which texts are looked at where some end before a stop text.
TURNS_TO_STOP = 8
# Events are sent after this time, and with many answers at once after as much as makes so many a second.
SECONDS_TO_SEND = 0.01
EVENTS_A_SECOND = 400
MOST_TURNS = 256  # that are kept before they are looked at


class FullError(InputError):
    """As many are waiting as may."""


class ClosedError(InputError):
    """The engine takes nothing more."""


class Meter:
    """What is counted; see `kmixer.serve.metrics`."""

    def read(self, tokens: int, cached: int) -> None: ...
    def wrote(self, tokens: int) -> None: ...
    def first(self, seconds: float) -> None: ...
    def pace(self, seconds: float) -> None: ...
    def step(self, seconds: float) -> None: ...


class Engine:
    """Answers jobs, from `start` to `stop`.

    Args:
        model: in evaluation mode; of constant state and prepared for `rows`, else one row at a time.
        tokenizer: the model's.
        rows: answers written at once.
        waiting: jobs in line beyond those that are worked on.
        prefix_memory: bytes of kept states.
        publish: takes the calls that deliver events, in order, to make them where it likes.
        meter: what counts.
        failed: called when the thread dies.
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Tokenizer,
        *,
        rows: int = 64,
        waiting: int = 256,
        prefix_memory: int = 1 << 26,
        publish: Callable[[list[tuple[Job, Event]]], None] | None = None,
        meter: Meter | None = None,
        failed: Callable[[], object] | None = None,
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self.alone = why_not_rows(model)  # why one row at a time
        self._decoder: Rows = RowDecoder(model, rows) if self.alone is None else EagerRow(model)
        self.rows = self._decoder.capacity
        self._prompts = Prompts(model, prepared=self.alone is None, prefix_memory=prefix_memory)
        self.prefixes = self._prompts.prefixes
        self._draws = RowDraws(self.rows, model.vocabulary_size)
        self._logits = torch.zeros(self.rows, model.vocabulary_size)
        self._turns = torch.zeros(MOST_TURNS, self.rows, dtype=torch.int64)
        self._publish, self._meter, self._failed = publish or _deliver, meter or Meter(), failed
        self._waiting_limit = waiting
        # Shared with other threads, under the lock:
        self._lock = threading.Condition()
        self._line: deque[Job] = deque()
        self._news = False
        self._stopping = False
        self.closed = False
        self.error: str | None = None
        # Of the thread alone:
        self._choices: list[Choice] = []  # of the rows
        self._began: list[tuple[float, float]] = []  # of the rows: first token, last look
        self._standings: dict[Job, Standing] = {}  # after the prompts, of sessions
        self._texts: dict[Choice, list[str]] = {}  # of sessions, so far
        self._open: dict[Job, int] = {}  # choices that are not finished
        self._turn = 0  # not looked at yet
        self._looks_at = 0  # the turn to look at the latest
        self._scores: list[dict[int, tuple[float, Likeliest]]] = []  # of these turns, by row
        self._outbox: list[tuple[Job, Event]] = []
        self._sent = 0.0
        self._thread = threading.Thread(target=self._run, name="kmixer engine", daemon=True)

    # From any thread.

    def start(self) -> None:
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Get in line. Raises InputError for what cannot be answered, FullError, ClosedError."""
        self._check(job)
        with self._lock:
            if self.closed:
                raise ClosedError("the server is stopping; try another, or again later")
            if len(self._line) >= self._waiting_limit + max(0, self.rows - self.active):
                raise FullError(f"{self._waiting_limit} requests are waiting, the most that may (--waiting); try again")
            self._line.append(job)
            self._news = True
            self._lock.notify()

    def cancel(self, job: Job) -> None:
        """Forget a job; its rows are free within a turn. Nothing happens where it has ended."""
        with self._lock:
            job.cancelled = True
            self._news = True
            self._lock.notify()

    def close(self) -> None:
        """Take nothing more; what is there is answered."""
        with self._lock:
            self.closed = True

    def stop(self) -> None:
        """End the thread; what is there is answered with an error."""
        with self._lock:
            self.closed = self._stopping = True
            self._lock.notify()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def active(self) -> int:
        """Choices that are read or written."""
        return len(self._choices) + sum(len(job.seeds) for job in self._prompts.jobs)

    @property
    def waiting(self) -> int:
        return len(self._line)

    def _check(self, job: Job) -> None:
        if not 1 <= len(job.seeds) <= self.rows:
            raise InputError(f"n: got {len(job.seeds)}; allowed: 1 to {self.rows}, the rows of this server")
        begun = job.begin or Standing(None)
        if not begun.unread and not job.tokens:
            raise InputError("prompt: got no token; give one or more")
        limit = self._model.config.max_positions
        asked = begun.tokens + len(job.tokens) + job.max_tokens
        if limit is not None and asked > limit:
            raise InputError(
                f"prompt and new tokens are {asked} positions; {self._model.config.limited_by} ends at {limit}: ask "
                "for fewer, or use a model with a toeplitz or conv base kernel, which stream"
            )

    # The thread.

    def _run(self) -> None:
        try:
            with torch.inference_mode(False), torch.no_grad():
                while self._take():
                    for prompt in self._prompts.read(READ_A_TURN if self._choices else READ_IN_A_ROW):
                        self._begin_writing(prompt)
                    if self._choices:
                        self._write()
                    self._send()
        except BaseException as error:
            self.error = one_line(f"{type(error).__name__}: {error}", 300)
            self._end_all(f"the server's engine has failed: {self.error}")
            if self._failed is not None:
                self._failed()
            if not isinstance(error, Exception):
                raise
        else:
            self._end_all("the server is stopping")

    def _take(self) -> bool:
        """Wait for work, drop what was cancelled, and let in what has room; False when the thread is to end."""
        with self._lock:
            while not (self._news or self._stopping or self._prompts or self._choices):
                self._lock.wait()
            if self._stopping:
                return False
            if not self._news and not self._line:
                return True
            self._news = False
            self._line = deque(job for job in self._line if not job.cancelled)
        if any(choice.job.cancelled for choice in self._choices):
            self._look()
            for row in reversed(range(len(self._choices))):
                if self._choices[row].job.cancelled:
                    self._forget(self._choices[row].job)
                    self._free(row)
        self._prompts.drop_cancelled()
        room = self.rows - self.active
        while self._line and len(self._line[0].seeds) <= room:
            with self._lock:
                job = self._line.popleft()
            room -= len(job.seeds)
            self._prompts.add(job)
        return True

    def _begin_writing(self, prompt: Prompt) -> None:
        """The prompt is read: tell so, and let the choices take rows."""
        job, tokens = prompt.job, tuple(prompt.tokens.tolist())
        self._meter.read(prompt.last - prompt.cached, prompt.cached)
        before = () if job.begin is None else job.begin.tail
        tail = tail_of(before, job.tokens)
        self._post(job, PromptRead(len(job.tokens), prompt.cached, prompt.scored(self._tokenizer)))
        standing = None
        if job.begin is not None or not job.max_tokens:
            standing = Standing(prompt.state, prompt.position, tokens[prompt.read :], tail)
        if not job.max_tokens:
            for index in range(len(job.seeds)):
                self._post(job, Piece(index, finish="length"))
            self._post(job, Ended(standing))
            return
        if standing is not None:
            self._standings[job] = standing
        assert prompt.logits is not None
        self._look()
        self._open[job] = len(job.seeds)
        for index, seed in enumerate(job.seeds):
            row = len(self._choices)
            self._decoder.put(row, prompt.state)
            self._draws.put(row, job.sampling, seeded_generator(torch.device("cpu"), seed))
            self._logits[row] = prompt.logits
            choice = Choice(job, index, self._tokenizer, tail)
            self._choices.append(choice)
            self._began.append((prompt.begun, 0.0))
            if job.begin is not None:
                self._texts[choice] = []
        self._plan()

    def _write(self) -> None:
        """One token for every row."""
        n = len(self._choices)
        logits = self._logits[:n]
        broken = self._draws(logits)
        self._turns[self._turn, :n] = self._draws.tokens[:n]
        if self._scoring:
            self._scores.append(self._score(logits))
        self._turn += 1
        if broken:
            self._break(broken)
        now = time.perf_counter()
        due = now - self._sent > max(SECONDS_TO_SEND, n / EVENTS_A_SECOND)
        if self._turn >= self._looks_at or due or self._turn == MOST_TURNS:
            self._look(now)
            for row in reversed(range(len(self._choices))):
                if self._choices[row].finish:
                    self._free(row)
        if n := len(self._choices):
            self._logits[:n] = self._decoder.step(self._draws.tokens[:n])
            self._meter.step(time.perf_counter() - now)

    def _score(self, logits: Tensor) -> dict[int, tuple[float, Likeliest]]:
        """Of the rows that ask for it, what the drawn tokens score."""
        return {
            row: scores_of(logits[row : row + 1], self._draws.tokens[row : row + 1], choice.job.top)[0]
            for row, choice in enumerate(self._choices)
            if choice.job.top is not None
        }

    def _look(self, now: float | None = None) -> None:
        """See what the turns since the last look have written."""
        turns, self._turn = self._turn, 0
        scores, self._scores = self._scores, []
        now = now or time.perf_counter()
        columns = self._turns[:turns, : len(self._choices)].T.tolist() if turns else ()
        for row, tokens in enumerate(columns):
            choice = self._choices[row]
            if choice.finish:
                continue
            before = len(choice.tokens)
            text = choice.take(tokens, [of_turn[row] for of_turn in scores] if choice.job.top is not None else [])
            wrote = len(choice.tokens) - before
            self._meter.wrote(wrote)
            begun, last = self._began[row]
            if not before:
                self._meter.first(now - begun)
            elif wrote:
                self._meter.pace((now - last) / wrote)
            self._began[row] = begun, now
            if choice in self._texts:
                self._texts[choice].append(text)
            scored = choice.scored()
            if text or scored or choice.finish:
                self._post(choice.job, Piece(choice.index, text, scored, choice.finish, choice.kept))
            if choice.finish:
                self._finish(row, choice)
        self._plan()

    def _finish(self, row: int, choice: Choice) -> None:
        """A choice is at its end: with the last of a job, tell where its session stands."""
        job = choice.job
        self._open[job] -= 1
        if self._open[job]:
            return
        standing = self._standings.get(job)
        if standing is not None:
            answer = "".join(self._texts[choice])
            if choice.finish == "stop":
                kept = choice.kept_tokens(self._tokenizer, answer)
                standing = Standing(standing.state, standing.position, kept, tail_of(standing.tail, kept))
            else:
                all_tokens = tuple(choice.tokens)
                read = standing.position + len(all_tokens) - 1
                tail = tail_of(standing.tail, all_tokens)
                standing = Standing(self._decoder.state(row), read, all_tokens[-1:], tail)
        self._forget(job)
        self._post(job, Ended(standing))

    def _break(self, rows: Iterable[int]) -> None:
        """Rows whose logits are no distribution: their jobs end."""
        self._look()
        jobs = {self._choices[row].job for row in rows}
        for job in jobs:
            self._post(job, Ended(error="logits: got NaN or infinity, from which no token can be drawn"))
            self._forget(job)
            job.cancelled = True
        for row in reversed(range(len(self._choices))):
            if self._choices[row].job in jobs:
                self._free(row)

    def _free(self, row: int) -> None:
        """Let the last row take the place of one that has ended."""
        choice = self._choices[row]
        self._texts.pop(choice, None)
        last = len(self._choices) - 1
        if row != last:
            self._decoder.move(last, row)
            self._draws.move(last, row)
            self._logits[row] = self._logits[last]
            self._choices[row], self._began[row] = self._choices[last], self._began[last]
        del self._choices[last], self._began[last]
        self._news = True  # there is room
        self._plan()

    def _forget(self, job: Job) -> None:
        self._standings.pop(job, None)
        self._open.pop(job, None)

    def _plan(self) -> None:
        """When to look at the latest, and whether tokens are scored."""
        self._scoring = any(choice.job.top is not None for choice in self._choices)
        self._looks_at = min((_turns_of(choice) for choice in self._choices), default=0)

    def _post(self, job: Job, event: Event) -> None:
        if not job.cancelled:
            self._outbox.append((job, event))

    def _send(self) -> None:
        """Give away what there is to tell, if it is time."""
        if self._outbox:
            outbox, self._outbox = self._outbox, []
            self._publish(outbox)
            self._sent = time.perf_counter()

    def _end_all(self, error: str) -> None:
        with self._lock:
            self.closed = True
            left = {*self._line, *self._prompts.jobs}
            self._line.clear()
        left |= {choice.job for choice in self._choices}
        self._prompts.clear()
        self._choices.clear()
        for job in left:
            self._post(job, Ended(error=error))
        self._send()


def _deliver(events: list[tuple[Job, Event]]) -> None:
    for job, event in events:
        job.deliver(event)


def _turns_of(choice: Choice) -> int:
    """After how many turns a choice is to be looked at: the first token is sent at once, and none is wasted."""
    if not choice.tokens:
        return 1
    return min(choice.left, TURNS_TO_STOP) if choice.job.stop else choice.left
