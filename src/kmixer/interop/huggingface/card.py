"""The card of a model: README.md of a Hugging Face folder, with the facts that its run recorded."""

from __future__ import annotations

import json
import shlex
from typing import Any, NamedTuple

from kmixer.data.corpora import CORPORA

FIGURES = {"loss": "loss, nats per token", "perplexity": "perplexity", "bits_per_byte": "bits per byte"}


class Facts(NamedTuple):
    """What is known of a model."""

    name: str
    parameters: int
    license: str | None = None
    corpus: str | None = None
    corpus_sha256: str | None = None
    description: str | None = None
    command: list[str] | None = None
    measured: list[dict[str, Any]] | None = None  # on the validation part, as results.json has it
    measured_test: list[dict[str, Any]] | None = None


def write_card(facts: Facts) -> str:
    """The whole of README.md."""
    return "\n".join(["---", *_head(facts), "---", "", *_body(facts), ""])


def _head(facts: Facts) -> list[str]:
    """Facts for the hub, as YAML; what JSON writes is YAML too."""
    values: dict[str, Any] = {"library_name": "kmixer", "pipeline_tag": "text-generation"}
    if facts.license is not None:
        values["license"] = facts.license
    if facts.corpus in CORPORA:
        values |= {"language": "en", "datasets": [facts.corpus]}
    if results := _results(facts):
        values["model-index"] = [{"name": facts.name, "results": results}]
    return [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]


def _results(facts: Facts) -> list[dict[str, Any]]:
    """One entry for every protocol, as the hub has them."""
    return [
        {
            "task": {"type": "text-generation", "name": "Text generation"},
            "dataset": {"name": facts.corpus, "type": facts.corpus, "split": part},
            "metrics": [
                {"type": name, "name": f"{called}, {protocol_of(measured)}", "value": measured[name]}
                for name, called in FIGURES.items()
                if measured.get(name) is not None
            ],
        }
        for part, all_measured in _parts(facts)
        for measured in all_measured
    ]


def _parts(facts: Facts) -> list[tuple[str, list[dict[str, Any]]]]:
    if facts.corpus is None:
        return []
    return [("validation", facts.measured or []), ("test", facts.measured_test or [])]


def protocol_of(measured: dict[str, Any]) -> str:
    """How it was measured, in words."""
    if measured["protocol"] == "windows":
        return f"the state reset every {measured['window']:,} tokens"
    return "one stream, the state never reset"


def _body(facts: Facts) -> list[str]:
    about = f"{facts.parameters:,} parameters" + (f": {facts.description}." if facts.description else ".")
    return [
        f"# {facts.name}",
        "",
        "transformers does not know this architecture by itself: `pip install 'kmixer[huggingface]'`, and import it",
        "first.",
        "",
        "```python",
        "import kmixer.huggingface  # makes the Auto classes know the model",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'folder = "."  # this folder, or its name on the hub',
        "model = AutoModelForCausalLM.from_pretrained(folder)",
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        "```",
        "",
        f'Or `kmixer.load("FOLDER")`, without transformers. {about}',
        *_figures(facts),
        *_data(facts),
        *(["", "## Made by", "", "```", shlex.join(facts.command), "```"] if facts.command else []),
    ]


def _figures(facts: Facts) -> list[str]:
    rows = [
        f"| {part} | {protocol_of(measured)} | {measured.get('tokens', 0):,} | "
        + " | ".join("" if measured.get(name) is None else f"{measured[name]:.4f}" for name in FIGURES)
        + " |"
        for part, all_measured in _parts(facts)
        for measured in all_measured
    ]
    if not rows:
        return []
    head = f"| part | protocol | tokens | {' | '.join(FIGURES.values())} |"
    note = "Weights were chosen by their loss on the validation part, so its figures are slightly optimistic."
    return ["", "## Figures", "", head, "|---" * (3 + len(FIGURES)) + "|", *rows, "", note]


def _data(facts: Facts) -> list[str]:
    if facts.corpus is None:
        return []
    known = CORPORA.get(facts.corpus)
    described = f" ({known.description}; {known.licence})" if known else ""
    return ["", "## Data", "", f"{facts.corpus}{described}, sha256 {facts.corpus_sha256 or 'unknown'}."]
