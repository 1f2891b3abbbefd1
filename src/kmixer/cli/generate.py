"""kmixer generate: continue a prompt, from the command line, a file, standard input, or line after line."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from typing import Annotated

import typer

from kmixer.cli.options import RunOrPackaged
from kmixer.data.reading import lines_of, text_source
from kmixer.errors import InputError
from kmixer.generation.conversation import Conversation
from kmixer.generation.sampling import Sampling
from kmixer.generation.streaming import generate_text
from kmixer.language_model import load


def generate(
    run: RunOrPackaged,
    prompt: Annotated[str | None, typer.Option(help="Text to continue.")] = None,
    prompt_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="Continue the text of a file; - is standard input.")
    ] = None,
    interactive: Annotated[
        bool, typer.Option("--interactive", help="Continue every line that is typed; an empty line ends.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add.")] = 400,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest tokens of total probability p.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes the text repeatable.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text to stop before; may be given again.")] = None,
) -> None:
    """Continue a text with a run's model, printed as it is written.

    Example: kmixer generate runs/shakespeare-quick-seed42 --prompt "**HAMLET**"
    """
    if (prompt is not None) + (prompt_file is not None) + interactive != 1:
        raise InputError("give one of --prompt TEXT, --prompt-file FILE (- is standard input) and --interactive")
    sampling = Sampling(temperature, top_k, top_p)
    model = load(run)
    assert model.tokenizer is not None
    if interactive:
        conversation = Conversation(model, model.tokenizer, sampling, max_new_tokens, seed, stop or ())
        for line in _typed_lines():
            _answer(conversation, line)
        return
    if prompt_file is not None:
        with text_source(prompt_file, raw=False) as blocks:
            prompt = "".join(map(str, blocks))
    assert prompt is not None
    pieces = generate_text(model, model.tokenizer, prompt, max_new_tokens, sampling, seed=seed, stop=stop or ())
    first = next(pieces, "")  # wrong input shows before anything is printed
    for piece in itertools.chain([prompt, first], pieces):
        print(piece, end="", flush=True)
    print()


def _typed_lines() -> Iterator[str]:
    """Lines from standard input, up to the first empty one."""
    with text_source("-", raw=False) as blocks:
        lines = lines_of(map(str, blocks))
        while True:
            if sys.stdin.isatty():
                print("> ", end="", file=sys.stderr, flush=True)
            line = next(lines, "").rstrip("\r\n")
            if not line:
                return
            yield line


def _answer(conversation: Conversation, line: str) -> None:
    try:
        for piece in conversation.continue_line(line):
            print(piece, end="", flush=True)
    except InputError as error:  # the next line may be better
        print(f"error: {error}", file=sys.stderr)
    else:
        print()
