"""kmixer ngram: count the n-grams of a run's training text, as a draft for speculative decoding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from kmixer.cli.options import DataDir, Json, Run
from kmixer.errors import InputError
from kmixer.files import is_there
from kmixer.generation.ngrams import count_run
from kmixer.language_model import load
from kmixer.runs.run_folder import RunFolder


def ngram(
    run: Run,
    out: Annotated[Path, typer.Option(help="File to make, .safetensors.")],
    order: Annotated[int, typer.Option(help="Tokens of an n-gram: the next one, and those before it.")] = 5,
    corpus: Annotated[str | None, typer.Option(help="Where the run's own data is now, if it was moved.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    as_json: Json = False,
    data_dir: DataDir = None,
) -> None:
    """Count which tokens follow which in the text that a run was trained on: a draft that needs no training.

    Counts of up to order - 1 tokens of context, in sorted arrays; about 75 bytes of memory a token while counting.

    Example: kmixer ngram runs/shakespeare-quick-seed42 --order 5 --out shakespeare-5.safetensors
    """
    if is_there(out) and not force:
        raise InputError(f"{out} exists; add --force to replace it, or choose --out")
    model = load(run)
    assert model.tokenizer is not None
    ngrams = count_run(RunFolder(run), model.tokenizer, order, corpus, data_dir)
    ngrams.save(out)
    contexts = [len(level.keys) for level in ngrams.contexts]
    if as_json:
        figures = {"order": ngrams.order, "tokens": int(ngrams.unigrams.sum()), "contexts": contexts}
        print(json.dumps({"file": str(out), **figures, "bytes": out.stat().st_size}))
        return
    lengths = ", ".join(f"{count:,} of {length}" for length, count in enumerate(contexts, 1))
    print(f"{int(ngrams.unigrams.sum()):,} tokens; contexts by length: {lengths or 'none'}")
    print(f"{out}  {out.stat().st_size:,} bytes")
