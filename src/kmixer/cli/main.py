"""The `kmixer` command: its parts, and how errors reach the user."""

from __future__ import annotations

import sys
from typing import Annotated, NoReturn

import typer

import kmixer
from kmixer.cli import (
    analysis,
    archive,
    bench,
    data,
    evaluate,
    experiments,
    export,
    generate,
    inspect,
    score,
    task,
    train,
)
from kmixer.errors import DivergedError, InputError


def _print_version(asked: bool) -> None:
    if asked:
        print(f"kmixer {kmixer.__version__}")
        raise typer.Exit


app = typer.Typer(
    name="kmixer",
    help="Attention-free and kernel-based sequence models: train, evaluate, generate.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Say the version.")
    ] = False,
) -> None:
    pass


app.command()(train.train)
app.command(name="eval")(evaluate.evaluate)
app.command()(score.score)
app.command()(generate.generate)
app.command()(experiments.sweep)
app.command(name="compare")(experiments.compare_runs)
app.command()(experiments.results)
app.command()(analysis.analyze)
app.command()(analysis.report)
app.command()(inspect.recipes)
app.command()(inspect.params)
app.command()(inspect.flops)
app.command()(archive.convert)
app.command()(archive.pack)
app.command()(archive.unpack)
app.command()(export.export)
app.add_typer(data.app, name="data")
app.add_typer(bench.app, name="bench")
app.add_typer(task.app, name="task")


def main() -> NoReturn:
    """Run the command line. Exit codes: 0, 1 a defect, 2 wrong input, 3 training diverged, 130 interrupted."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    try:
        app(arguments)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has gone
        sys.stdout = None
        sys.exit(1)
    except Exception as error:
        if debug:
            raise
        print(f"error: {_describe(error)}", file=sys.stderr)
        sys.exit(_exit_code(error))
    sys.exit(0)


def _exit_code(error: Exception) -> int:
    if isinstance(error, DivergedError):
        return 3
    return 2 if isinstance(error, InputError | OSError) else 1


def _describe(error: Exception) -> str:
    """One line: our own messages as they are, anything else with its type and the way to its traceback."""
    if isinstance(error, InputError | DivergedError):
        return str(error)
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]} (--debug shows where)"
