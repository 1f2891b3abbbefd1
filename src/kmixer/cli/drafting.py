"""What the commands with a draft have in common: its settings, the draft itself, and what came of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from kmixer.errors import InputError, check_choice, shown
from kmixer.generation.drafts import Draft, NgramDraft
from kmixer.generation.named_drafts import NAMES, is_draft_name, ngrams_of, open_draft
from kmixer.generation.speculation import RULES, Speculation
from kmixer.generation.tally import SpeculationResult
from kmixer.language_model import LanguageModel, load
from kmixer.models.model_folder import packaged_models

LARGEST = 1 << 10  # drafted tokens of a round


def speculation_of(accept: str, draft_tokens: str = "4", **settings: Any) -> Speculation:
    """The settings that options ask for. Raises InputError for those that do not go together."""
    check_choice("--accept", accept, RULES)
    tokens: Any = draft_tokens
    if draft_tokens != "auto":
        if not (draft_tokens.isascii() and draft_tokens.isdigit() and 1 <= int(draft_tokens) <= LARGEST):
            raise InputError(f"--draft-tokens: got {shown(draft_tokens)}; allowed: 1 to {LARGEST:,}, or auto")
        tokens = int(draft_tokens)
    return Speculation(accept, tokens, **settings)  # type: ignore[arg-type]


def drafts_of(
    model: LanguageModel,
    draft: str,
    speculation: Speculation,
    corpus: str | None = None,
    data_dir: Path | None = None,
) -> Callable[[], Draft]:
    """Makes drafts of a name or of a run folder; corpus and data_dir are of the text that n-grams are counted in.

    Raises InputError for what is neither, or does not fit the model.
    """
    if not is_draft_name(draft):
        if not Path(draft).exists() and draft not in packaged_models():
            raise InputError(f"--draft: got {shown(draft)}, which is no run folder; allowed: a run, {NAMES}")
        return partial(open_draft, model, load(Path(draft)), speculation)
    ngrams = ngrams_of(model, draft, corpus, data_dir)
    return partial(open_draft, model, draft, speculation) if ngrams is None else partial(NgramDraft, ngrams)


def statistics_of(result: SpeculationResult) -> list[str]:
    """What came of a decoding, in lines."""
    emitted = result.kept + result.rounds
    seconds, plain = result.seconds, result.plain_tokens_per_second
    lines = [
        f"{emitted:,} tokens in {seconds.whole:.3f} s, {result.tokens_per_second:,.0f} a second: {result.rounds:,} "
        f"rounds of {result.mean_emitted:.2f} tokens"
        + ("" if plain is None else f"; about {plain:,.0f} a second without a draft"),
        f"kept {result.kept:,} of {result.drafted:,} drafted tokens, {result.mean_kept:.2f} a round"
        + ("" if result.acceptance is None else f"; acceptance {result.acceptance:.3f}"),
    ]
    if result.spent_max:
        lines.append(f"spent by a drafted token: {result.spent_mean:.3f} nats, at most {result.spent_max:.3f}")
    if result.verifier_nll is not None:
        lines.append(f"under the model at temperature 1: {result.verifier_nll:.3f} nats per token")
    lines.append(
        f"seconds: draft {seconds.draft:.3f}, model {seconds.verification:.3f}, rule {seconds.rule:.3f}, "
        f"going back {seconds.rollback:.3f}"
    )
    return lines
