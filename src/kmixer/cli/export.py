"""kmixer export: the decoding step of a run, for use elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from kmixer.cli.options import RunOrPackaged


def export(
    run: RunOrPackaged,
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    format: Annotated[
        Literal["onnx", "torch"], typer.Option(help="For an ONNX runtime, or for torch.export.load.")
    ] = "onnx",
    force: Annotated[bool, typer.Option("--force", help="Replace the export that is in the folder.")] = False,
) -> None:
    """Export a run's step from one token to the next, its state explicit, to run it without kmixer.

    Example: kmixer export runs/shakespeare-quick-seed42 --out quick-onnx
    """
    from kmixer.interop.export import export as write
    from kmixer.language_model import load

    model = load(run)
    assert model.tokenizer is not None
    file = write(model, model.tokenizer, out, format, force=force)
    print(f"{file} ({file.stat().st_size:,} bytes), with step.json and tokenizer.json beside it")
