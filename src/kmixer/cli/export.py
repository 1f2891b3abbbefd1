"""kmixer export: a run for use elsewhere, as one decoding step or as a Hugging Face folder; kmixer import: back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from kmixer.cli.options import RunOrPackaged
from kmixer.errors import InputError


def export(
    run: RunOrPackaged,
    out: Annotated[Path, typer.Option(help="Folder to make; of html, the file.")],
    format: Annotated[
        Literal["onnx", "torch", "html", "huggingface"],
        typer.Option(help="For an ONNX runtime, for torch.export.load, a page for any browser, or for transformers."),
    ] = "onnx",
    prompt: Annotated[str, typer.Option(help="Of html: the text that stands on the page.")] = "",
    half: Annotated[bool, typer.Option("--half", help="Of html: 16 bits a weight, for half the size.")] = False,
    license: Annotated[
        str | None, typer.Option("--license", metavar="NAME", help="Of huggingface: for the card, mit for example.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the export that is there.")] = False,
) -> None:
    """Export a run to use it elsewhere: its step from one token to the next, a page, or a folder for transformers.

    Example: kmixer export runs/shakespeare-quick-seed42 --format html --out quick.html
    """
    from kmixer.interop.export import export as write
    from kmixer.interop.huggingface.folder import export_folder
    from kmixer.interop.page import write_page
    from kmixer.language_model import load

    if license is not None and format != "huggingface":
        raise InputError(f"--license: got {license!r} with --format {format}; it goes with --format huggingface")
    if (prompt or half) and format != "html":
        raise InputError(f"--prompt and --half: given with --format {format}; they belong to html")
    model = load(run)
    assert model.tokenizer is not None and model.folder is not None
    if format == "html":
        name = Path(run).name
        file = write_page(model, model.tokenizer, out, name=name, prompt=prompt, half=half, force=force)
        print(f"{file} ({file.stat().st_size:,} bytes): open it in a browser")
        return
    if format == "huggingface":
        file = export_folder(model, model.tokenizer, model.folder, out, license=license, force=force)
        print(f"{file} ({file.stat().st_size:,} bytes), with what transformers needs and the card beside it")
        if license is None:
            print("the card names no licence; --license NAME does")
        return
    file = write(model, model.tokenizer, out, format, force=force)
    print(f"{file} ({file.stat().st_size:,} bytes), with step.json and tokenizer.json beside it")


def import_folder(
    folder: Annotated[Path, typer.Argument(help="A folder of kmixer export --format huggingface, or of transformers.")],
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    force: Annotated[bool, typer.Option("--force", help="Replace the run that is in the folder.")] = False,
) -> None:
    """Turn a Hugging Face folder of a kmixer model back into a run, or, trained further elsewhere, a model folder.

    Example: kmixer import quick-huggingface --out runs/quick
    """
    from kmixer.interop.huggingface.folder import import_folder as make

    print(f"{make(folder, out, force=force)} {out}")
