"""kmixer generate: continue a prompt, from the command line, a file, standard input, or line after line."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from typing import Annotated

import typer

from kmixer.cli.drafting import drafts_of, speculation_of, statistics_of
from kmixer.cli.options import Accept, Bound, DataDir, Delta, Draft, ExactGamma, Mix, RunOrPackaged, Weights
from kmixer.data.reading import lines_of, text_source
from kmixer.errors import InputError
from kmixer.generation.conversation import Conversation
from kmixer.generation.sampling import Sampling
from kmixer.generation.speculative import Rounds
from kmixer.generation.streaming import encode_prompt, generate_tokens, text_of
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
    draft: Draft = None,
    draft_tokens: Annotated[
        str, typer.Option(metavar="M", help="Tokens drafted in a round; auto: as many as pay, or none.")
    ] = "auto",
    accept: Accept = "coupled",
    delta: Delta = None,
    bound: Bound = None,
    mix: Mix = None,
    exact_gamma: ExactGamma = False,
    weights: Weights = "float32",
    stats: Annotated[bool, typer.Option("--stats", help="Say on standard error what came of the draft.")] = False,
    data_dir: DataDir = None,
) -> None:
    """Continue a text with a run's model, printed as it is written.

    Example: kmixer generate runs/shakespeare-quick-seed42 --prompt "**HAMLET**"
    """
    if (prompt is not None) + (prompt_file is not None) + interactive != 1:
        raise InputError("give one of --prompt TEXT, --prompt-file FILE (- is standard input) and --interactive")
    sampling = Sampling(temperature, top_k, top_p)
    speculation = speculation_of(accept, draft_tokens, delta=delta, bound=bound, mix=mix, exact_gamma=exact_gamma)
    if draft is None and (stats or speculation != speculation_of("coupled", "auto")):
        raise InputError(
            "--accept, --draft-tokens, their settings and --stats go with --draft; add it, or leave them out"
        )
    if draft is not None and interactive:
        raise InputError("--draft goes with --prompt and --prompt-file; leave it out for --interactive")
    model = load(run, weights=weights)
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
    tokens = encode_prompt(model, model.tokenizer, prompt)
    rounds = None
    if draft is None:
        columns = generate_tokens(model, tokens, max_new_tokens, sampling, seed=seed)
    else:
        drafts = drafts_of(model, draft, speculation, data_dir=data_dir)()
        rounds = Rounds(model, drafts, tokens, max_new_tokens, speculation, sampling, seed=seed, tally=stats)
        columns = rounds.columns()
    pieces = text_of(tokens, columns, model.tokenizer, stop or ())
    first = next(pieces, "")  # wrong input shows before anything is printed
    for piece in itertools.chain([prompt, first], pieces):
        print(piece, end="", flush=True)
    print()
    if rounds is not None:
        lines = statistics_of(rounds.result(tokens)) if stats else []
        for line in [*lines, *([rounds.note] if rounds.note else [])]:
            print(line, file=sys.stderr)


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
