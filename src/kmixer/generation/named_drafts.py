"""Drafts by name, and whether a draft fits the model that verifies it.

"ngram:5"          counts of the text that the model's run was trained on, of 5 tokens; "counts.safetensors" made
                   by kmixer ngram
"lookup"           what followed the latest tokens earlier in the text itself
"self:2"           the model's own first 2 mixing layers
"self:passes=1"    one pass of its refinement
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Protocol, runtime_checkable

from kmixer.data.tokenizers import Tokenizer
from kmixer.errors import InputError, shown
from kmixer.generation.cut_short import fewer_passes, first_layers
from kmixer.generation.drafts import Draft, LookupDraft, ModelDraft, NgramDraft, check_same_tokens
from kmixer.generation.ngrams import Ngrams, count_run
from kmixer.generation.speculation import Speculation
from kmixer.models.causal_lm import CausalLM
from kmixer.runs.run_folder import RunFolder

AnyDraft = Draft | CausalLM | str
NAMES = "ngram:N, lookup, self:J, self:passes=N, or a file of kmixer ngram (.safetensors)"


@runtime_checkable
class Loaded(Protocol):
    """A model that knows its tokenizer, and the folder that it was loaded from."""

    tokenizer: Tokenizer | None
    folder: Path | None


def tokenizer_of(model: CausalLM) -> Tokenizer | None:
    """The tokenizer of a model that has one."""
    return model.tokenizer if isinstance(model, Loaded) else None


def is_draft_name(name: str) -> bool:
    """Whether `open_draft` takes this for a name; what is none may be a run folder."""
    return name.endswith(".safetensors") or name.partition(":")[0] in ("ngram", "lookup", "self")


def open_draft(model: CausalLM, draft: AnyDraft, speculation: Speculation) -> Draft:
    """The draft of that name, made of that model, or as it is.

    Raises InputError for an unknown name, one that this model cannot serve, and a draft with other tokens.
    """
    if isinstance(draft, CausalLM):
        theirs = tokenizer_of(draft)
        _check_tokens(model, None if theirs is None else theirs.to_json(), draft.vocabulary_size)
        return ModelDraft(draft)
    if not isinstance(draft, str):
        return draft
    kind, _, value = draft.partition(":")
    if draft == "lookup":
        lockstep = speculation.pace == "lockstep"
        return LookupDraft(speculation.max_match, speculation.min_match, lockstep=lockstep)
    if (ngrams := ngrams_of(model, draft)) is not None:
        return NgramDraft(ngrams)
    if kind == "self" and re.fullmatch(r"(passes=)?\d{1,9}", value):
        count = int(value.removeprefix("passes="))
        return ModelDraft((fewer_passes if value.startswith("passes=") else first_layers)(model, count))
    raise InputError(f"draft: got {shown(draft)}; allowed: {NAMES}")


def ngrams_of(model: CausalLM, draft: str, corpus: str | None = None, data_dir: Path | None = None) -> Ngrams | None:
    """The counts that a draft of this name asks for, read or made of the text of the model's run; None of another.

    corpus and data_dir say where that text is now, see `count_run`. Raises InputError as `open_draft` does.
    """
    if draft.endswith(".safetensors"):
        ngrams = Ngrams.load(Path(draft))
        _check_tokens(model, ngrams.tokenizer, ngrams.vocabulary_size)
        return ngrams
    if not re.fullmatch(r"ngram:\d{1,9}", draft):
        return None
    if not isinstance(model, Loaded) or model.folder is None or not (run := RunFolder(model.folder)).exists():
        raise InputError(
            f"draft: got {draft}, which counts the text of a run, and this model was loaded from none; "
            "give a file of kmixer ngram"
        )
    assert model.tokenizer is not None
    return count_run(run, model.tokenizer, int(draft.removeprefix("ngram:")), corpus, data_dir)


def _check_tokens(model: CausalLM, theirs: dict[str, object] | None, size: int) -> None:
    tokenizer = tokenizer_of(model)
    check_same_tokens(None if tokenizer is None else tokenizer.to_json(), model.vocabulary_size, theirs, size)
