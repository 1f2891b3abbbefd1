"""A run knows its own files: what was changed, or comes from another run, is noticed where it is read.

Every run is known by the sha256 of its recipe.toml, seed included. environment.json, the weights, the checkpoint and
results.json carry it, so any of them can be written at any moment, and a kill between two writes leaves a good run.
A checkpoint holds the length and sha256 that metrics.jsonl had (`mark_of`); results.json, written last, holds a sha256
of itself and of every other file. Runs made before files carried it are taken as they are.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from kmixer.errors import InputError
from kmixer.files import LINES_BYTES, is_there, read_bytes, sha256_of
from kmixer.models.model_folder import CONFIG, TOKENIZER, WEIGHTS
from kmixer.runs import records
from kmixer.runs.layout import CHECKPOINT, ENVIRONMENT, METRICS, RECIPE, RESULTS
from kmixer.tensor_files import read_header

# How a file says to which run it belongs, and results.json what the others are.
RUN, FILE_DIGESTS, OWN_DIGEST = "recipe_sha256", "files", "sha256"
TENSOR_FILES = (WEIGHTS, CHECKPOINT)


def identity(run: Path) -> str:
    """What a run is known by."""
    return sha256_of(run / RECIPE)


def mark_of(content: bytes) -> dict[str, Any]:
    """Length and sha256 of what metrics.jsonl holds."""
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def sealed(run: Path, results: dict[str, Any]) -> dict[str, Any]:
    """results.json as it is written: with the run it belongs to, and the sha256 of itself and of every other file."""
    names = (CONFIG, TOKENIZER, WEIGHTS, METRICS, ENVIRONMENT, CHECKPOINT)
    digests = {name: _digest(run, name) for name in names if (run / name).is_file()}
    return with_digest(results | {RUN: identity(run), FILE_DIGESTS: digests})


def with_digest(document: dict[str, Any]) -> dict[str, Any]:
    """A document with the sha256 of all that is in it."""
    whole = json.loads(json.dumps(document))  # as it will be read
    return whole | {OWN_DIGEST: _digest_of(whole)}


def is_whole(document: dict[str, Any]) -> bool:
    """Whether a document is what its own sha256 says."""
    return bool(document.get(OWN_DIGEST) == _digest_of(document))


def read_results(run: Path) -> dict[str, Any]:
    """results.json, checked against its own sha256; empty where there is none. Raises InputError for anything else."""
    path = run / RESULTS
    if not is_there(path):
        return {}
    results = records.read_results(path)
    if RUN not in results and OWN_DIGEST not in results:
        return results
    if not is_whole(results) or not isinstance(results.get(FILE_DIGESTS), dict):
        raise changed(run, RESULTS)
    return results


def check_files(run: Path, *names: str) -> None:
    """Raises InputError, one line, where one of these files of a run is not what the run wrote.

    Tensors are not read: whoever loads a file of weights checks it against its own header, which is checked here.
    """
    results = read_results(run)
    judges = (ENVIRONMENT, RESULTS, *names, *((CHECKPOINT,) if METRICS in names and not results else ()))
    claims = {name: _claim(run, name) for name in dict.fromkeys(judges) if _claims(run, name)}
    known = identity(run)
    carried = {name: claim for name, claim in claims.items() if claim is not None}
    if carried and known not in carried.values():
        raise changed(run, RECIPE)
    for name, claim in claims.items():
        # Where the environment does not carry it, the run began before files did.
        if claim != known and (claim is not None or claims.get(ENVIRONMENT) is not None):
            raise changed(run, name)
    for name, digest in results.get(FILE_DIGESTS, {}).items():
        if name not in names:
            continue
        if is_there(run / name):
            if _digest(run, name) != digest:
                raise changed(run, name)
        elif name not in TENSOR_FILES:  # records of runs are kept without these
            raise InputError(f"{run / name} is missing; restore it from a copy")
    if METRICS in names and not results and (run / CHECKPOINT).is_file():
        check_metrics(run)


def check_metrics(run: Path) -> None:
    """Raises InputError where metrics do not begin with what they were at the last checkpoint: more may come since."""
    mark = _read_checkpoint(run)["metrics"]  # before the metrics: a run that goes on may write both meanwhile
    content = read_bytes(run / METRICS, LINES_BYTES) if is_there(run / METRICS) else b""
    if mark_of(content[: mark["bytes"]]) != mark:
        raise changed(run, METRICS)


def changed(run: Path, name: str) -> InputError:
    """The error of a file that is not what the run wrote."""
    if name == METRICS:
        return InputError(f"{run / name} was shortened or edited since the last checkpoint; restore it from a copy")
    if name == RECIPE:
        way_out = "restore it from a copy, or train another run with the recipe as it is now"
    elif name == RESULTS and (run / CHECKPOINT).is_file():
        way_out = "restore it from a copy, or remove it: kmixer train --resume measures again"
    else:
        way_out = "restore it from a copy"
    return InputError(f"{run / name} was changed after the run wrote it, or is of another run; {way_out}")


def _claims(run: Path, name: str) -> bool:
    """Whether a file is there that may say which run it belongs to."""
    return name in (ENVIRONMENT, RESULTS, *TENSOR_FILES) and is_there(run / name)


def _claim(run: Path, name: str) -> str | None:
    """The run that a file says it belongs to; None where it does not say."""
    if name == CHECKPOINT:
        claim = _read_checkpoint(run).get(RUN)
    elif name == WEIGHTS:
        about = read_header(run / name)[0].get("about")
        claim = about.get(RUN) if isinstance(about, dict) else None
    elif name == RESULTS:
        claim = read_results(run).get(RUN)
    else:
        claim = records.read_environment(run / name).get(RUN)
    return claim if isinstance(claim, str) and claim else None


def _read_checkpoint(run: Path) -> dict[str, Any]:
    metadata, _ = read_header(run / CHECKPOINT)
    mark = metadata.get("metrics")
    if "step" not in metadata or not isinstance(mark, dict) or not isinstance(mark.get("bytes"), int):
        raise InputError(f"{run / CHECKPOINT} is not a checkpoint of a run; restore it from a copy")
    return metadata


def _digest(run: Path, name: str) -> str:
    return read_header(run / name)[1] if name in TENSOR_FILES else sha256_of(run / name)


def _digest_of(document: dict[str, Any]) -> str:
    rest = {key: value for key, value in document.items() if key != OWN_DIGEST}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
