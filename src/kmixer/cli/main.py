"""The `kmixer` command: its parts, and how errors reach the user."""

from __future__ import annotations

import sys
from typing import NoReturn

import typer

from kmixer.cli import data, export, inspect, model
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
app.command()(inspect.recipes)
app.command()(inspect.params)
app.command()(model.convert)
app.command()(model.pack)
app.command()(model.unpack)
app.command()(export.export)
app.add_typer(data.app, name="data")


def main() -> NoReturn:
    """Run the command line. Exit codes: 0, 2 wrong input, 3 training diverged, 130 interrupted."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    try:
        app(arguments)
    except (InputError, DivergedError) as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 3)
    sys.exit(0)
