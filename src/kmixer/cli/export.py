"""kmixer export: the decoding step of a run, for use elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from kmixer.cli.options import RunOrPackaged


def export(
    run: RunOrPackaged,
    out: Annotated[Path, typer.Option(help="Folder to make; of html, the file.")],
    format: Annotated[
        Literal["onnx", "torch", "html"],
        typer.Option(help="For an ONNX runtime, for torch.export.load, or a page that any browser opens."),
    ] = "onnx",
    prompt: Annotated[str, typer.Option(help="Of html: the text that stands on the page.")] = "",
    half: Annotated[bool, typer.Option("--half", help="Of html: 16 bits a weight, for half the size.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the export that is there.")] = False,
) -> None:
    """Export a run's step from one token to the next, its state explicit, to run it without kmixer.

    Example: kmixer export runs/shakespeare-quick-seed42 --format html --out quick.html
    """
    from kmixer.errors import InputError
    from kmixer.interop.export import export as write
    from kmixer.interop.page import write_page
    from kmixer.language_model import load

    model = load(run)
    assert model.tokenizer is not None
    if format == "html":
        name = Path(run).name
        file = write_page(model, model.tokenizer, out, name=name, prompt=prompt, half=half, force=force)
        print(f"{file} ({file.stat().st_size:,} bytes): open it in a browser")
        return
    if prompt or half:
        raise InputError(f"--prompt and --half: given with --format {format}; they belong to html")
    file = write(model, model.tokenizer, out, format, force=force)
    print(f"{file} ({file.stat().st_size:,} bytes), with step.json and tokenizer.json beside it")
