"""kmixer bench peers: models of other libraries beside ours, of equal size."""

from __future__ import annotations

import sys
from typing import Annotated, Literal

import typer

from kmixer.analysis.figure_files import check_figure, write_figure
from kmixer.bench.measure import roofs, settle
from kmixer.bench.models import Precision
from kmixer.bench.peers import OURS, PEERS, SIZES, bench_peers, draw_peers, present
from kmixer.cli.bench_report import print_report
from kmixer.cli.options import FigureFile, Json, Threads
from kmixer.errors import InputError, check_choice

# Beyond this size a round takes minutes.
USUAL_SIZES = "0.17M,0.84M,4M"


def peers(
    sizes: Annotated[str, typer.Option(help=f"Of {', '.join(SIZES)}, a list.")] = USUAL_SIZES,
    windows: Annotated[str, typer.Option(help="Tokens of the windows of training, a list.")] = "256,1024",
    precision: Annotated[
        Literal["float32", "bfloat16", "both"], typer.Option(help="Of training; decoding is float32.")
    ] = "float32",
    context: Annotated[int, typer.Option(min=1, help="Tokens before those that are decoded.")] = 1024,
    rounds: Annotated[int, typer.Option(min=1, help="In which all models take turns, after a first one.")] = 3,
    without: Annotated[list[str] | None, typer.Option(metavar="MODEL", help="Leave this one out.")] = None,
    figure: FigureFile = None,
    threads: Threads = 1,
    as_json: Json = False,
) -> None:
    """Time training and decoding beside LSTM and GRU of torch, GPT-2 and Mamba-2 of transformers, of equal size.

    Example: kmixer bench peers --sizes 0.17M --figure peers.svg
    """
    check_figure(figure)
    names = [name.strip() for name in sizes.split(",")]
    for name in names:
        check_choice("--sizes", name, SIZES)
    for name in without or ():
        check_choice("--without", name, [peer.name for peer in PEERS if peer.name != OURS])
    if not all(part.strip().isdecimal() and 0 < int(part) <= 1 << 16 for part in windows.split(",")):
        raise InputError(f"--windows: got {windows!r}; allowed: numbers from 1 to 65536, such as 256,1024")
    lengths = [int(part) for part in windows.split(",")]
    precisions: list[Precision] = ["float32", "bfloat16"] if precision == "both" else [precision]
    for peer in PEERS:
        if peer not in present():
            print(f"{peer.name} is left out: pip install {peer.needs}", file=sys.stderr)
    settle(threads)
    roof, rows = roofs(), []
    for row in bench_peers(names, lengths, precisions, context, rounds, roof, tuple(without or ())):
        rows.append(row)
        said = row.get("refused") or f"{row['tokens_per_second']:,.0f} tokens/s"
        work = f"{row['what']} {row['window']:,} {row['precision']}"
        print(f"{row['size']} {row['model']}, {work}: {said}", file=sys.stderr)
    if figure is not None:
        write_figure(draw_peers(rows), figure)
    columns = {
        "what": "what", "window": "window", "precision": "precision", "size": "size", "model": "model",
        "parameters": "parameters", "tokens/s": "tokens_per_second", "of ours": "of_ours", "of roof": "part_of_roof",
    }  # fmt: skip
    print_report("peers", roof, rows, columns, as_json)
