"""kmixer lab: what a model's layers do to what passes them. A command is its file and its line here."""

from __future__ import annotations

import typer

from kmixer.cli.lab_ecology import ecology
from kmixer.cli.lab_geometry import geometry
from kmixer.cli.lab_overlap import overlap
from kmixer.cli.lab_signal import signal

app = typer.Typer(help="What a model's layers do to what passes them.", no_args_is_help=True)

for command in (signal, overlap, geometry, ecology):
    app.command()(command)
