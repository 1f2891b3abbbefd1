"""`kmixer eval --tasks`: what lm-evaluation-harness measures of a model."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kmixer.cli.adaptation import Adaptation
from kmixer.errors import InputError
from kmixer.language_model import load


@dataclass(frozen=True)
class Tasks:
    """What was asked: the options of the command that go with --tasks."""

    names: list[str]
    include: Path | None
    limit: int | None
    prefix: str
    unknown: Literal["error", "drop"]

    def __post_init__(self) -> None:
        if not self.names:
            raise InputError("--tasks: got no name; give one or more, with commas between them")
        if self.limit is not None and self.limit < 1:
            raise InputError(f"--limit: got {self.limit}; allowed: 1 document or more")
        if importlib.util.find_spec("lm_eval") is None:
            raise InputError("--tasks needs lm-eval: pip install 'kmixer[evals]'")


def evaluate_on_tasks(run: Path, tasks: Tasks, memory: int | None, adaptation: Adaptation, as_json: bool) -> None:
    """Measure a model on tasks of the harness, and print its figures."""
    model = load(run, memory=memory)  # first: the harness takes long to import
    from lm_eval.utils import make_table

    from kmixer.evals import KMixerLM, evaluate_tasks

    with adaptation.applied(model):
        lm = KMixerLM(model, tasks.prefix, tasks.unknown)
        results = evaluate_tasks(lm, tasks.names, tasks.include, tasks.limit)
    read = lm.get_model_info()
    if as_json:
        kept = {
            key: results[key] for key in ("results", "groups", "n-samples", "versions", "lm_eval") if key in results
        }
        print(json.dumps(kept | {"read": read | adaptation.to_json(model)}, default=float))
        return
    print(f"lm-eval {results['lm_eval']}; {read['documents']}, after {read['prefix']!r}{adaptation.words(model)}")
    if read["contexts_cut"]:
        print(f"{read['contexts_cut']:,} contexts were cut at their beginning, to what the model can read")
    if read["characters_dropped"]:
        print(f"{read['characters_dropped']:,} characters that the tokenizer does not know were dropped")
    print(make_table(results))
    if "groups" in results:
        print(make_table(results, "groups"))
