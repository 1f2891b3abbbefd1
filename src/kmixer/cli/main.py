"""The `kmixer` command: its parts, and how errors reach the user."""

from __future__ import annotations

import contextlib
import errno
import io
import os
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
    lab,
    ngram,
    score,
    serve,
    task,
    track,
    train,
)
from kmixer.errors import DivergedError, InputError, one_line


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
app.command()(serve.serve)
app.command()(ngram.ngram)
app.command()(experiments.sweep)
app.command(name="compare")(experiments.compare_runs)
app.command()(experiments.results)
app.command()(analysis.analyze)
app.command()(analysis.report)
app.command()(inspect.recipes)
app.command()(inspect.params)
app.command()(inspect.flops)
app.command()(track.track)
app.command()(archive.convert)
app.command()(archive.pack)
app.command()(archive.unpack)
app.command()(export.export)
app.command(name="import")(export.import_folder)
app.add_typer(data.app, name="data")
app.add_typer(bench.app, name="bench")
app.add_typer(lab.app, name="lab")
app.add_typer(task.app, name="task")


def main() -> NoReturn:
    """Run the command line and leave with its exit code."""
    code = run(sys.argv[1:])
    if sys.stdout is not None and not _flush():
        # The interpreter would try once more at its end, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Run a command; the exit code: 0, 1 a defect, 2 wrong input, 3 training diverged, 130 interrupted."""
    debug = "--debug" in arguments
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # what the terminal cannot show is spelled out
    try:
        app([argument for argument in arguments if argument != "--debug"])
        sys.stdout.flush()
    except SystemExit as ended:  # how typer ends a command
        return _code_of(ended) if _flush() else _complain(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has gone
        sys.stdout = None  # type: ignore[assignment]
        return 1
    except Exception as error:
        if debug:
            raise
        return _complain(error)
    return 0


def _code_of(ended: SystemExit) -> int:
    return ended.code if isinstance(ended.code, int) else int(ended.code is not None)


def _complain(error: Exception) -> int:
    """Say in one line what went wrong; the exit code."""
    with contextlib.suppress(OSError):  # there may be no one to tell
        print(f"error: {one_line(_describe(error))}", file=sys.stderr)
    if isinstance(error, DivergedError):
        return 3
    return 2 if isinstance(error, InputError | OSError) or _is_lack_of_memory(error) else 1


def _flush() -> bool:
    """Whether all that was printed has reached its place."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return True
    except OSError:
        return False
    return True


def _describe(error: Exception) -> str:
    """Our own messages as they are, anything else with its type and the way to its traceback."""
    if isinstance(error, InputError | DivergedError):
        return str(error)
    if _is_lack_of_memory(error):
        return "not enough memory for what was asked; try a smaller model, batch or window (--debug shows where)"
    if isinstance(error, OSError):
        reason = error.strerror or str(error) or type(error).__name__
        if error.filename is not None:
            other = f" or {error.filename2}" if error.filename2 is not None else ""
            return f"cannot use {_path(error.filename)}{other}: {reason}"
        return f"cannot write the output: {reason}"  # what goes to a file names it
    return f"{type(error).__name__}: {one_line(str(error), 300)} (--debug shows where)"


def _path(name: object) -> str:
    return os.fsdecode(name) if isinstance(name, str | bytes | os.PathLike) else f"file descriptor {name}"


def _is_lack_of_memory(error: Exception) -> bool:
    """torch tells that memory of the CPU is lacking by a RuntimeError alone."""
    import torch

    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )
