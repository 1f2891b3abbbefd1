"""Settings of speculative decoding: the rule that keeps drafted tokens, how many are drafted, and its numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from kmixer.errors import InputError, check_choice
from kmixer.generation.rules import Bounded, Cactus, Exact, Interp, Rule, Typical

RuleName = Literal["coupled", "exact", "block", "cactus", "bounded", "typical", "interp"]
Pace = Literal["lockstep", "own"]
Measure = Literal["law"]
RULES: tuple[str, ...] = get_args(RuleName)
# Which rule a setting goes with, where it is given.
RULE_OF = {"delta": "cactus", "bound": "bounded", "mix": "interp"}


@dataclass(frozen=True)
class Speculation:
    """How drafted tokens are checked.

    rule, see `kmixer.generation.acceptance` and `kmixer.generation.rules`:
        "coupled" gives the text of plain generation with the same seed, and "exact" and "block" its law;
        "bounded" a law within KL(h, q) <= bound; "cactus", "typical" and "interp" another law.
    tokens: drafted in a round, or "auto".
    delta: of "cactus", which has to say it: nats that one drafted token may spend, no bound on what is emitted.
    exact_gamma: of "cactus": solve for gamma where the published rule takes a step of Taylor's.
    bound: of "bounded", which has to say it: nats.
    mix: of "interp", which has to say it: the draft's part, 0 to 1.
    epsilon, alpha: of "typical".
    max_match, min_match: tokens that a look-up draft compares, at most and at least.
    measure: "law" measures the divergence of what is emitted too, which takes v^2 operations per position.
    pace: "lockstep" lets all rows of a batch advance as far as the shortest, "own" every row by itself.
    """

    rule: RuleName = "coupled"
    tokens: int | Literal["auto"] = 4
    delta: float | None = None
    exact_gamma: bool = False
    bound: float | None = None
    mix: float | None = None
    epsilon: float = 0.09
    alpha: float = 0.3
    max_match: int = 4
    min_match: int = 2
    measure: Measure | None = None
    pace: Pace = "lockstep"

    def __post_init__(self) -> None:
        check_choice("rule", self.rule, RULES)
        check_choice("pace", self.pace, get_args(Pace))
        if self.measure is not None:
            check_choice("measure", self.measure, get_args(Measure))
        if self.tokens != "auto" and (isinstance(self.tokens, str) or self.tokens < 1):
            raise InputError(f"tokens: got {self.tokens!r}; allowed: 1 or more, or 'auto'")
        for name, rule in RULE_OF.items():
            given = getattr(self, name)
            if given is None and rule == self.rule:
                raise InputError(f"{name}: got none; rule {rule!r} has no default for it, give 0 (exact) or more")
            if given is not None and rule != self.rule:
                raise InputError(f"{name}: got {given} with rule {self.rule!r}; it goes with rule {rule!r}")
            if given is not None and not 0 <= given < float("inf"):
                raise InputError(f"{name}: got {given}; allowed: 0 (exact) or more")
        if self.mix is not None and self.mix > 1:
            raise InputError(f"mix: got {self.mix}; allowed: 0 (exact) to 1 (the draft)")
        if self.exact_gamma and self.rule != "cactus":
            raise InputError(f"exact_gamma: got True with rule {self.rule!r}; it goes with rule 'cactus'")
        for name in ("epsilon", "alpha"):
            if not 0 < getattr(self, name) <= 1:
                raise InputError(f"{name}: got {getattr(self, name)}; allowed: above 0, up to 1")
        if not 1 <= self.min_match <= self.max_match:
            raise InputError(
                f"min_match, max_match: got {self.min_match}, {self.max_match}; allowed: 1 <= min_match <= max_match"
            )

    def check_rows(self, rows: int) -> None:
        """Raises InputError for a batch of so many rows that the rule cannot decode at this pace."""
        if self.rule == "block" and self.pace == "lockstep" and rows > 1:
            raise InputError(
                f"rule 'block': got {rows} rows in lockstep, which would look ahead; give one row, pace 'own' "
                "or rule 'exact'"
            )

    def token_rule(self) -> Rule | None:
        """The rule that decides token by token; None of "coupled" and "block", which do not."""
        match self.rule:
            case "exact":
                return Exact()
            case "cactus":
                assert self.delta is not None
                return Cactus(self.delta, self.exact_gamma)
            case "bounded":
                assert self.bound is not None
                return Bounded(self.bound)
            case "typical":
                return Typical(self.epsilon, self.alpha)
            case "interp":
                assert self.mix is not None
                return Interp(self.mix)
            case _:
                return None
