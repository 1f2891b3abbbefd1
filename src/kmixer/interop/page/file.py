"""A model as one HTML file: opened from disk it reads, colours and writes text, and asks nothing of a network.

The file has the list of operations (`operation_list`), its arrays, the tokenizer, and the scripts beside this module,
which are a decoding step, the tokenizers and the page in JavaScript without any library. Its policy allows these
scripts alone, by their digests, and no request.
"""

from __future__ import annotations

import base64
import hashlib
import json
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from kmixer.data.tokenizers import BytePairTokenizer, Tokenizer
from kmixer.errors import InputError
from kmixer.files import write_text
from kmixer.interop.operation_list import operation_list
from kmixer.models.causal_lm import CausalLM

SCRIPTS = ("step.js", "tokenizer.js", "page.js")


def write_page(
    model: CausalLM,
    tokenizer: Tokenizer,
    out: Path,
    *,
    name: str = "model",
    prompt: str = "",
    half: bool = False,
    force: bool = False,
) -> Path:
    """Write a model into one HTML file.

    Args:
        model: in evaluation mode, on a CPU, in float32; see `operation_list`.
        tokenizer: of characters, bytes or byte pairs.
        out: the file to write, atomically.
        name: what the page is called.
        prompt: the text that stands there first.
        half: numbers of 16 bits for tables and matrices: half the size, logits that differ in the third digit.
        force: replace the file.

    Returns:
        The file.

    Raises:
        InputError: a model or tokenizer that a page cannot run, a prompt with unknown characters, a file that is there.
    """
    if out.exists() and not force:
        raise InputError(f"{out}: there is a file already; give another name or --force")
    if unknown := tokenizer.unknown(prompt):
        raise InputError(f"prompt: the tokenizer does not know {', '.join(map(repr, unknown))}")
    listed = operation_list(model, half=half)
    described = {"model": listed.description, "tokenizer": page_tokenizer(tokenizer)}
    script, style = "\n".join(map(_text_of, SCRIPTS)), _text_of("page.css")
    policy = f"default-src 'none'; script-src {_digest(script)}; style-src {_digest(style)}; base-uri 'none'"
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(_text_of("page.html"))
    write_text(
        out,
        page.render(
            name=name,
            parameters=f"{sum(parameter.numel() for parameter in model.parameters()):,}",
            unit="character" if described["tokenizer"]["kind"] == "char" else "piece of it",
            prompt=prompt,
            policy=Markup(policy),
            script=Markup(script),
            style=Markup(style),
            description=Markup(json.dumps(described, separators=(",", ":")).replace("<", "\\u003c")),
            arrays=base64.b64encode(listed.arrays).decode(),
        ),
    )
    return out


def page_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """What tokenizer.js reads. Raises InputError for SentencePiece, and for byte pairs that kmixer did not train."""
    described = tokenizer.to_json()
    if described["kind"] in ("char", "byte"):
        return described
    if not isinstance(tokenizer, BytePairTokenizer):
        raise InputError(f"tokenizer: got {described['kind']!r}; a page runs 'char', 'byte' and 'bpe'")
    pairs = json.loads(described["model"])
    splitters = pairs["pre_tokenizer"]
    splitters = splitters["pretokenizers"] if splitters and splitters["type"] == "Sequence" else [splitters]
    *before, last = splitters
    plain = last and last["type"] == "ByteLevel" and not last["add_prefix_space"] and last["use_regex"]
    bounded = before[0]["pattern"]["Regex"] if before and before[0]["type"] == "Split" else None
    if not plain or pairs["normalizer"] or pairs["added_tokens"] or len(before) != (bounded is not None):
        raise InputError("tokenizer: these byte pairs are not as kmixer trains them, so that a page cannot run them")
    pieces: dict[str, int] = pairs["model"]["vocab"]
    merges = [merge if isinstance(merge, list) else merge.split(" ") for merge in pairs["model"]["merges"]]
    return {
        "kind": "bpe",
        "bounded": bounded,
        "pieces": list(map(list, tokenizer.pieces)),
        "merges": [[pieces[left], pieces[right], pieces[left + right]] for left, right in merges],
    }


def _text_of(name: str) -> str:
    return (resources.files("kmixer") / "interop" / "page" / name).read_text(encoding="utf-8")


def _digest(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
