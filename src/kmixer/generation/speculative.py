"""Speculative decoding: a draft proposes tokens, the model reads them in one chunk, and a rule says which stand.

    result = speculate(model, draft, prompt, 200, Speculation("coupled", tokens=4), Sampling(0.8), seed=1)

A round begins with one token that was emitted and not read yet, the pending one. The draft proposes m more, the model
reads all m + 1, the first k proposals stand, and one token is drawn after them: it is pending next.

What each rule guarantees: `kmixer.generation.speculation`. What proposes: `kmixer.generation.drafts`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from kmixer.errors import InputError
from kmixer.generation.acceptance import Verdict, lockstep
from kmixer.generation.chunks import open_reader
from kmixer.generation.decoder import Decoder
from kmixer.generation.drafts import Draft
from kmixer.generation.draws import open_draws
from kmixer.generation.named_drafts import AnyDraft, open_draft, tokenizer_of
from kmixer.generation.sampling import Sampling
from kmixer.generation.speculation import Speculation
from kmixer.generation.streaming import before_last, check_request, encode_prompt, seeded_generator, step_of, text_of
from kmixer.generation.tally import Seconds, SpeculationResult, Tally
from kmixer.generation.tempo import LARGEST, FixedTempo, MeasuredTempo, Tempo, measure_costs
from kmixer.models.causal_lm import CausalLM
from kmixer.state import State


def speculate(
    model: CausalLM,
    draft: AnyDraft,
    prompt: str | Int[Tensor, "b t"],
    max_new_tokens: int,
    speculation: Speculation | None = None,
    sampling: Sampling | None = None,
    seed: int | None = 0,
    *,
    stop: Sequence[str] = (),
) -> SpeculationResult:
    """Continue a prompt with a draft, and say what came of it.

    Args:
        model: in evaluation mode; with a tokenizer, for a text.
        draft: a model with the same tokens, a `Draft`, or a name, see `open_draft`.
        prompt: a text, or tokens (b, t) int64, one or more a row.
        max_new_tokens: tokens to add to every row.
        speculation: "coupled" with 4 tokens when None.
        sampling: plain sampling at temperature 1 when None; of draft and model alike.
        seed: of the drawing; None draws a fresh one.
        stop: texts before which generation ends; for a text prompt.

    Raises:
        InputError: as plain generation does; for a draft that does not fit the model; for a model in training mode, or
            a batch that the rule cannot decode.
    """
    speculation = speculation or Speculation()
    tokenizer = tokenizer_of(model)
    if isinstance(prompt, str):
        if tokenizer is None:
            raise InputError("this model has no tokenizer: give the prompt as tokens (b, t)")
        tokens = encode_prompt(model, tokenizer, prompt)
    elif stop:
        raise InputError("stop texts go with a text prompt, not with tokens")
    else:
        tokens = prompt
    opened = open_draft(model, draft, speculation)
    rounds = Rounds(model, opened, tokens, max_new_tokens, speculation, sampling, seed=seed, tally=True)
    new: list[Tensor] = []
    columns = _noted(rounds.columns(), new)
    text = None
    if isinstance(prompt, str):
        assert tokenizer is not None
        text = prompt + "".join(text_of(tokens, columns, tokenizer, stop))
    else:
        deque(columns, maxlen=0)
    return rounds.result(torch.cat([tokens, *(column[:, None] for column in new)], 1), text)


def generate_drafted(
    model: CausalLM,
    draft: AnyDraft,
    prompt: Int[Tensor, "b t"],
    max_new_tokens: int,
    speculation: Speculation | None = None,
    sampling: Sampling | None = None,
    *,
    seed: int | None = None,
) -> Iterator[Int[Tensor, " b"]]:
    """The next tokens of every row, one position at a time: `generate_tokens` with a draft. Arguments: `speculate`."""
    speculation = speculation or Speculation()
    opened = open_draft(model, draft, speculation)
    yield from Rounds(model, opened, prompt, max_new_tokens, speculation, sampling, seed=seed).columns()


def _noted(columns: Iterator[Tensor], taken: list[Tensor]) -> Iterator[Tensor]:
    for column in columns:
        taken.append(column)
        yield column


class Rounds:
    """The rounds of one prompt.

    Args:
        model: in evaluation mode.
        draft: with the same tokens; it belongs to these rounds from now on.
        prompt, max_new_tokens, speculation, sampling, seed: see `speculate`.
        tally: count and measure, for `result`.

    Raises InputError as `speculate` does.
    """

    def __init__(
        self,
        model: CausalLM,
        draft: Draft,
        prompt: Int[Tensor, "b t"],
        max_new_tokens: int,
        speculation: Speculation | None = None,
        sampling: Sampling | None = None,
        *,
        seed: int | None = None,
        tally: bool = False,
    ) -> None:
        check_request(model, prompt, max_new_tokens)
        prompt = prompt.long()
        if model.training:
            raise InputError("model: got one in training mode; call model.eval() first")
        self._model, self._draft, self._prompt = model, draft, prompt
        self._speculation, self._sampling = speculation or Speculation(), sampling or Sampling()
        self._speculation.check_rows(len(prompt))
        self._lockstep = self._speculation.pace == "lockstep"
        if not self._lockstep and len(prompt) > 1 and (limit := model.config.max_positions) is not None:
            raise InputError(
                f"pace 'own': got {len(prompt)} rows, of which some run ahead, and {model.config.limited_by} ends at "
                f"{limit} positions; give pace 'lockstep' or one row"
            )
        self._draws = open_draws(self._speculation, self._sampling, seeded_generator(prompt.device, seed))
        self._count, self._left = max_new_tokens, [max_new_tokens] * len(prompt)
        self._ready: list[deque[int]] = [deque() for _ in self._left]  # emitted and not given out
        self._reader: Decoder | None = None  # none before the prompt is read
        self._tempo: Tempo
        self._drafting = True  # not yet given up
        self._pending = prompt[:, -1]
        self._nothing = prompt.new_zeros(len(prompt), 0, dtype=torch.int64)
        self._last: tuple[Verdict, int] | None = None  # the last round and its drafted tokens, while not committed
        self._tally = Tally(self._speculation, self._sampling) if tally else None

    def columns(self) -> Iterator[Int[Tensor, " b"]]:
        """The new tokens of every row, one position at a time, as `generate_tokens` gives them."""
        for index in range(self._count):
            while not all(self._ready):
                if not self._drafting and self._tally is None and not any(self._ready):
                    yield from self._plain(self._count - index)
                    return
                self._round()
            tokens = [row.popleft() for row in self._ready]
            yield torch.tensor(tokens, dtype=torch.int64, device=self._prompt.device)

    def _plain(self, count: int) -> Iterator[Int[Tensor, " b"]]:
        """The rest without a draft and without counting, as fast as plain generation."""
        assert self._reader is not None
        step = step_of(self._reader)
        for _ in range(count):
            self._pending = self._draws.plain(step(self._pending))
            yield self._pending

    def result(self, tokens: Tensor, text: str | None = None) -> SpeculationResult:
        """What came of the rounds so far, and the tokens (b, t + new) and text that the caller made of them."""
        assert self._tally is not None
        plain_seconds = None if self._reader is None else self._tempo.plain_seconds
        return self._tally.result(tokens, text, self.note, plain_seconds)

    @property
    def note(self) -> str | None:
        """What the user should know, for example that drafting does not pay."""
        return None if self._reader is None else self._tempo.note

    def state(self) -> State:
        """Where the model stands: before the token of every row that was emitted last."""
        self._begin()
        self._settle(Seconds())
        assert self._reader is not None
        return self._reader.state()

    @torch.inference_mode()
    def _begin(self) -> None:
        """Read the prompt but for its last token, which is pending."""
        if self._reader is not None:
            return
        self._reader = open_reader(self._model, before_last(self._model, self._prompt))
        if self._speculation.tokens != "auto":
            self._tempo = FixedTempo(self._speculation.tokens)
        else:
            longest = min(LARGEST, max(self._left) - 1) + 1
            counts = [n for n in (2, 4, 8, LARGEST + 1) if n <= longest] or [1]
            self._tempo = MeasuredTempo(measure_costs(self._reader, self._pending, self._sampling, counts))
        self._draft.start(self._prompt)

    @torch.inference_mode()
    def _round(self) -> None:
        self._begin()
        assert self._reader is not None
        clock, spent = time.perf_counter, Seconds()
        began = clock()
        self._settle(spent)
        wanted = self._tempo.tokens()
        self._drafting = wanted > 0
        p, drafted = None, self._nothing
        started = clock()
        if wanted:
            drafted, p = self._draft.propose(min(wanted, max(self._left) - 1), self._draws.draft)
        m = drafted.shape[1]
        proposed = clock()
        if m:
            logits = self._reader.read(torch.cat([self._pending[:, None], drafted], 1))
        else:
            logits = self._reader.step(self._pending)[:, None]
        verified = clock()
        q, verdict, own = self._judge(p, logits, drafted)
        kept = self._emit(drafted, verdict)
        judged = clock()
        spent.draft, spent.verification, spent.rule = proposed - started, verified - proposed, judged - verified
        spent.whole = judged - began
        self._tempo.learn(sum(kept), sum(k < m for k in kept), m, spent.draft, spent.rule + spent.rollback)
        if self._tally is not None:
            self._tally.add(p, q, logits, drafted, verdict, own)
            self._tally.seconds.add(spent)
        self._pending, self._last = verdict.last, (verdict, m) if wanted else None

    def _judge(self, p: Tensor | None, logits: Tensor, drafted: Tensor) -> tuple[Tensor | None, Verdict, Verdict]:
        """The model's rows, none where nothing was drafted; what stands, and what would of every row alone."""
        if not drafted.shape[1]:
            verdict = Verdict(torch.zeros_like(self._pending), self._draws.plain(logits[:, 0]))
            return None, verdict, verdict
        q = self._sampling.rows(logits)
        own = self._draws.judge(p, q, drafted)
        verdict = lockstep(own, drafted) if self._lockstep else own
        self._draws.emitted(verdict.kept + 1)
        return q, verdict, own

    def _emit(self, drafted: Tensor, verdict: Verdict) -> list[int]:
        """Note what stands of a round; how many drafted tokens of every row do."""
        kept: list[int] = verdict.kept.tolist()
        rows = zip(drafted.tolist(), kept, verdict.last.tolist(), strict=True)
        for row, (tokens, count, last) in enumerate(rows):
            self._ready[row].extend([*tokens[:count], last])
            self._left[row] -= count + 1
        return kept

    def _settle(self, spent: Seconds) -> None:
        """Let draft and model stand after the last round."""
        if self._last is None:
            return
        assert self._reader is not None
        began = time.perf_counter()
        (verdict, m), self._last = self._last, None
        if m:
            self._reader.commit(verdict.kept + 1)
        self._draft.commit(verdict.kept, verdict.last)
        spent.rollback += time.perf_counter() - began
