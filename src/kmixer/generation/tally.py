"""What came of speculative decoding: how much was kept, what was spent of the rule's budget, and where time went."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kmixer.generation.acceptance import Verdict, divergence, emitted
from kmixer.generation.rules import Cactus, Exact, Rule, chosen, spent
from kmixer.generation.sampling import Sampling, one_hot
from kmixer.generation.speculation import Speculation


@dataclass
class Seconds:
    """Where the time of rounds went; all of them together are less than the whole, by the loop around them."""

    draft: float = 0.0  # proposing
    verification: float = 0.0  # the verifier, reading
    rule: float = 0.0  # filters, random numbers and the verdict
    rollback: float = 0.0  # standing where the text stands, draft and verifier
    whole: float = 0.0

    def add(self, more: Seconds) -> None:
        """Those of another round too."""
        for part in fields(self):
            setattr(self, part.name, getattr(self, part.name) + getattr(more, part.name))


@dataclass(frozen=True)
class SpeculationResult:
    """A text, and how it came about. Counts are sums over the rows of a batch; what is spent is in nats.

    tokens: prompt and continuation (b, t + new).
    text: the same, of a text prompt.
    rounds: of the verifier; one without a draft is a plain step.
    drafted, kept, refused: tokens. What follows a refusal, or another row's in lockstep, is neither kept nor refused.
    mean_kept: of a round and row, without the token that is drawn after those kept (papers: accepted length).
    mean_emitted: with it.
    kept_by_position: of the first, second, ... drafted token of a round, how often it was kept.
    acceptance: kept of kept and refused, None where nothing was drafted.
    spent_mean, spent_max: kl(gamma, q_n) of the drafted tokens that were judged; 0 of rules with the verifier's law,
        None of others than "cactus", which have no such budget.
    output_divergence_mean, output_divergence_max: KL(h, q) of what is emitted, with `Speculation.measure` "law".
    verifier_nll: mean -ln q at temperature 1, before filters, of what was emitted.
    seconds: of the rounds, without the prompt.
    plain_tokens_per_second: of the model without draft, where it was measured: with tokens "auto".
    note: what the user should know, for example that drafting does not pay.
    """

    tokens: Tensor
    text: str | None
    rounds: int
    drafted: int
    kept: int
    refused: int
    mean_kept: float
    mean_emitted: float
    kept_by_position: tuple[int, ...]
    acceptance: float | None
    spent_mean: float | None
    spent_max: float | None
    output_divergence_mean: float | None
    output_divergence_max: float | None
    verifier_nll: float | None
    seconds: Seconds
    tokens_per_second: float
    plain_tokens_per_second: float | None = None
    note: str | None = None

    def to_json(self) -> dict[str, Any]:
        """All figures; neither tokens nor text."""
        return {key: value for key, value in asdict(self).items() if key not in ("tokens", "text")}


@dataclass
class Mean:
    """A mean and a maximum that grow."""

    total: float = 0.0
    count: int = 0
    largest: float = 0.0

    def add(self, values: Tensor) -> None:
        if values.numel():
            self.total += float(values.sum())
            self.count += values.numel()
            self.largest = max(self.largest, float(values.max()))

    @property
    def mean(self) -> float | None:
        return self.total / self.count if self.count else None

    @property
    def maximum(self) -> float | None:
        return self.largest if self.count else None


@dataclass
class Tally:
    """Adds up rounds.

    Args:
        speculation, sampling: those of the decoding.
    """

    speculation: Speculation
    sampling: Sampling
    rounds: int = 0
    drafted: int = 0
    kept: int = 0
    refused: int = 0
    emitted: int = 0
    row_rounds: int = 0
    by_position: list[int] = field(default_factory=list)
    spent: Mean = field(default_factory=Mean)
    divergence: Mean = field(default_factory=Mean)
    nll: Mean = field(default_factory=Mean)
    seconds: Seconds = field(default_factory=Seconds)

    def add(
        self,
        p: Float[Tensor, "b m v"] | None,
        q: Float[Tensor, "b n v"] | None,
        logits: Float[Tensor, "b n v"],
        tokens: Int[Tensor, "b m"],
        verdict: Verdict,
        own: Verdict,
    ) -> None:
        """One round: rows of draft and verifier, what was drafted, what stands of it, and what did by row alone.

        q is None in a round without draft.
        """
        b, m = tokens.shape
        kept: list[int] = verdict.kept.tolist()
        self.rounds += 1
        self.row_rounds += b
        self.drafted += b * m
        self.kept += sum(kept)
        self.emitted += sum(kept) + b
        # A row that kept more than the shortest has had no token refused.
        self.refused += sum(k == alone < m for k, alone in zip(kept, own.kept.tolist(), strict=True))
        self.by_position += [0] * (m - len(self.by_position))
        for position in range(m):
            self.by_position[position] += sum(position < k for k in kept)
        self._measure_nll(logits, tokens, verdict)
        if q is not None:
            self._measure_budget(p, q[:, :m], tokens, verdict.kept)

    def _measure_nll(self, logits: Tensor, tokens: Tensor, verdict: Verdict) -> None:
        given = torch.cat([tokens, verdict.last[:, None]], 1).scatter(1, verdict.kept[:, None], verdict.last[:, None])
        losses = -chosen(logits.double().log_softmax(-1), given)
        self.nll.add(losses[torch.arange(losses.shape[1], device=losses.device) <= verdict.kept[:, None]])

    def _measure_budget(self, p: Tensor | None, q: Tensor, tokens: Tensor, kept: Tensor) -> None:
        rule = rule_of(self.speculation, self.sampling)
        judged = torch.arange(tokens.shape[1], device=tokens.device) <= kept[:, None]
        p = one_hot(tokens, q.shape[-1]) if p is None else p
        if isinstance(rule, Exact | Cactus):
            q_drafted = chosen(q, tokens)
            self.spent.add(spent(rule.mass(p, q, tokens), q_drafted)[judged])
        if self.speculation.measure == "law":
            p, q = p[judged], q[judged]
            self.divergence.add(divergence(emitted(rule, p, q), q).clamp_min(0))

    def result(
        self, tokens: Tensor, text: str | None, note: str | None = None, plain_seconds: float | None = None
    ) -> SpeculationResult:
        """Of all rounds so far; plain_seconds are those of a step without draft, where they were measured."""
        judged = self.kept + self.refused
        return SpeculationResult(
            tokens=tokens,
            text=text,
            rounds=self.rounds,
            drafted=self.drafted,
            kept=self.kept,
            refused=self.refused,
            mean_kept=self.kept / max(1, self.row_rounds),
            mean_emitted=self.emitted / max(1, self.row_rounds),
            kept_by_position=tuple(self.by_position),
            acceptance=self.kept / judged if judged else None,
            spent_mean=self.spent.mean,
            spent_max=self.spent.maximum,
            output_divergence_mean=self.divergence.mean,
            output_divergence_max=self.divergence.maximum,
            verifier_nll=self.nll.mean,
            seconds=self.seconds,
            tokens_per_second=self.emitted / self.seconds.whole if self.seconds.whole else 0.0,
            plain_tokens_per_second=None if plain_seconds is None else len(tokens) / plain_seconds,
            note=note,
        )


def rule_of(speculation: Speculation, sampling: Sampling) -> Rule:
    """The rule whose law what is emitted has; `Exact` of all that have the verifier's."""
    return Exact() if sampling.temperature == 0 else speculation.token_rule() or Exact()
