"""kmixer serve: a model over HTTP."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer

from kmixer.cli.options import RunOrPackaged, Weights
from kmixer.errors import InputError, shown
from kmixer.files import read_text
from kmixer.language_model import load

LOOPBACK = ("127.0.0.1", "localhost", "::1")
UNITS = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
KEY = "KMIXER_API_KEY"


def serve(
    run: RunOrPackaged,
    host: Annotated[str, typer.Option(help="Address to listen on; another than this machine's own needs a key.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help=f"File that holds the key; or the variable {KEY}.")
    ] = None,
    weights: Weights = "float32",
    rows: Annotated[int, typer.Option(min=1, max=1024, help="Answers that are written at once.")] = 64,
    waiting: Annotated[int, typer.Option(min=0, help="Requests in line beyond them.")] = 256,
    prefix_memory: Annotated[str, typer.Option(metavar="SIZE", help="For states of prompts that were read.")] = "64MiB",
    session_memory: Annotated[str, typer.Option(metavar="SIZE", help="For states of sessions.")] = "64MiB",
    max_tokens: Annotated[int, typer.Option(min=1, help="Of one answer.")] = 4096,
    max_prompt_tokens: Annotated[int, typer.Option(min=1, help="Of one prompt.")] = 65536,
    max_body: Annotated[str, typer.Option(metavar="SIZE", help="Of one request.")] = "1MiB",
    grace: Annotated[float, typer.Option(min=0, help="Seconds for answers to end after SIGTERM.")] = 10.0,
    cors: Annotated[list[str] | None, typer.Option(metavar="ORIGIN", help="Pages that may ask.")] = None,
    allowed_host: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Another name of this server.")] = None,
) -> None:
    """Serve a model as OpenAI's completions, with a page that colours what surprises it.

    Example: kmixer serve shakespeare-small
    """
    key = _key(api_key_file)
    if host not in LOOPBACK and key is None:
        raise InputError(f"--host {host}: others could use this server; give a key by --api-key-file FILE or {KEY}")
    sizes = {"prefix_memory": prefix_memory, "session_memory": session_memory, "max_body": max_body}
    in_bytes = {name: _bytes(name, size) for name, size in sizes.items()}
    try:
        from kmixer.serve.app import Limits, Service, build_app
        from kmixer.serve.running import run_service
    except ImportError as error:
        raise InputError(f"{error.name} is missing, which kmixer serve needs: pip install 'kmixer[serve]'") from None
    model = load(run, weights=weights)
    assert model.tokenizer is not None and model.folder is not None
    torch.set_num_threads(1)
    limits = Limits(rows=rows, waiting=waiting, max_tokens=max_tokens, max_prompt_tokens=max_prompt_tokens, **in_bytes)
    service = Service(model, model.tokenizer, model.folder.resolve().name, limits)
    if (reason := service.engine.alone) is not None:
        print(f"one answer at a time, without states of prefixes: {reason}", file=sys.stderr)
    hosts = [*LOOPBACK, host, *(allowed_host or ())] if host in LOOPBACK or allowed_host else None
    app = build_app(service, key=key, hosts=hosts, cors=cors or [])
    code = run_service(
        service, app, host, port, grace, lambda where: print(f"{service.name} at {where} (Ctrl-C ends)", flush=True)
    )
    raise typer.Exit(code)


def _key(file: Path | None) -> str | None:
    """The key, from a file or the environment. Raises InputError for one that no header can hold."""
    key = os.environ.get(KEY) if file is None else read_text(file, 1 << 12).strip()
    if key is None:
        return None
    if not re.fullmatch(r"[!-~]{8,512}", key):
        raise InputError("the key: allowed are 8 to 512 letters, digits and signs, without spaces; choose another")
    return key


def _bytes(name: str, size: str) -> int:
    parts = re.fullmatch(r"(\d{1,15})\s*(\w*)", size.strip())
    if parts is None or parts[2] not in UNITS:
        raise InputError(f"--{name.replace('_', '-')}: got {shown(size)}; allowed: a number and {', '.join(UNITS)[2:]}")
    return int(parts[1]) * UNITS[parts[2]]
