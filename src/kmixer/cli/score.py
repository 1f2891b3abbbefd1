"""kmixer score: how surprising every line or token of a text is to a model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Literal

import typer

from kmixer.cli.options import RunOrPackaged
from kmixer.data.reading import Block, text_source
from kmixer.data.tokenizers import ByteTokenizer
from kmixer.errors import InputError, one_line
from kmixer.language_model import LanguageModel, load
from kmixer.measure.score import Line, ScoredToken, Summary, score_lines, score_tokens

SHOWN_CHARACTERS = 100  # of a line, where it is not JSON


def score(
    run: RunOrPackaged,
    text: Annotated[str, typer.Argument(metavar="FILE", help="A text, or - for standard input.")],
    per: Annotated[
        Literal["line", "token"] | None,
        typer.Option(help="Print every line or token, as soon as it is known, instead of a summary."),
    ] = None,
    top: Annotated[int, typer.Option(help="How many of the most surprising lines a summary shows.")] = 10,
    window: Annotated[
        int | None, typer.Option(help="Let the state begin anew after so many tokens; default: never, if it need not.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, one object a line.")] = False,
) -> None:
    """Find what is surprising in a text: nats and bits per byte of every line, given everything before it.

    The text is read once and in constant memory, so that a log can be scored while it is written.

    Example: kmixer score runs/my-log-seed42 today.log --top 20
    """
    if top < 0:
        raise InputError(f"--top: got {top}; allowed: 0 or more")
    if window is not None and window < 2:
        raise InputError(f"--window: got {window}; allowed: 2 or more")
    model = load(run)
    assert model.tokenizer is not None
    with text_source(text, raw=isinstance(model.tokenizer, ByteTokenizer)) as blocks:
        if per == "token":
            for token in score_tokens(model, model.tokenizer, blocks, window):
                print(json.dumps(token.to_json()) if as_json else _token(token), flush=text == "-")
        elif per == "line":
            for line in score_lines(model, model.tokenizer, blocks, window):
                print(json.dumps(line.to_json()) if as_json else _line(line), flush=text == "-")
        else:
            _summarise(model, blocks, top, window, as_json)


def _summarise(model: LanguageModel, blocks: Iterator[Block], top: int, window: int | None, as_json: bool) -> None:
    assert model.tokenizer is not None
    summary = Summary(top)
    for line in score_lines(model, model.tokenizer, blocks, window):
        summary.add(line)
    if not summary.tokens:
        raise InputError("the text has fewer than 2 tokens; there is nothing to score")
    if as_json:
        print(json.dumps(summary.to_json()))
        for line in summary.most_surprising():
            print(json.dumps(line.to_json()))
        return
    print(
        f"{summary.lines:,} lines, {summary.bytes:,} bytes, {summary.tokens:,} tokens: "
        f"{summary.nats_per_token:.4f} nats per token, {summary.bits_per_byte:.4f} bits per byte"
    )
    if top:
        print(f"{'line':>8}  {'bits per byte':>13}  {'nats':>9}  most surprising first")
    for line in summary.most_surprising():
        print(_line(line))


def _line(line: Line) -> str:
    return f"{line.number:8}  {line.bits_per_byte:13.3f}  {line.nats:9.2f}  {one_line(line.text[:SHOWN_CHARACTERS])}"


def _token(token: ScoredToken) -> str:
    nats = "-" if token.nats is None else f"{token.nats:.3f}"
    return f"{token.line:8}  {nats:>9}  {token.text!r}"
