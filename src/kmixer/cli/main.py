"""The `kmixer` command: its parts, and how errors reach the user."""

from __future__ import annotations

import sys
from typing import NoReturn

import typer

from kmixer.cli import analysis, bench, data, experiments, export, inspect, model, task
from kmixer.errors import DivergedError, InputError

app = typer.Typer(
    name="kmixer",
    help="Attention-free and kernel-based sequence models: train, evaluate, generate.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command()(model.train)
app.command(name="eval")(model.evaluate)
app.command()(model.generate)
app.command()(experiments.sweep)
app.command(name="compare")(experiments.compare_runs)
app.command()(experiments.results)
app.command()(analysis.analyze)
app.command()(analysis.report)
app.command()(inspect.recipes)
app.command()(inspect.params)
app.command()(inspect.flops)
app.command()(model.convert)
app.command()(model.pack)
app.command()(model.unpack)
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
