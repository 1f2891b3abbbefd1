"""What `kmixer lab` leaves in a run folder: checked where it is read, and known to be of this run's weights.

It is no file of the run's own: nothing that reads, packs or replaces a run looks at it, and a report draws it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from kmixer.errors import InputError
from kmixer.files import is_there, read_json, write_json
from kmixer.models.model_folder import WEIGHTS
from kmixer.runs.records import Count, Number, Record
from kmixer.runs.run_folder import RunFolder
from kmixer.tensor_files import read_header

LAB_SIGNAL = "lab-signal.json"


# Logarithms whose exponential is a number with room on both sides.
Log = Annotated[float, Field(ge=-300, le=300)]


class SignalCurve(Record):
    """One model, or several initialisations of it, layer by layer: l = 0 to L."""

    name: str
    log_growth: list[Log]  # log J(L, l)
    log_growth_error: list[Annotated[float, Field(ge=0, le=100)]]
    q: list[Annotated[float, Field(ge=0, le=1e30)]]
    cosine: list[Number]
    log_theory: list[Log] | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if len(self.log_growth) < 2:
            raise ValueError("log_growth: it has no layers")
        for name in ("log_growth_error", "q", "cosine", "log_theory"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.log_growth):
                raise ValueError(f"{name}: it has another length than log_growth")
        return self


class SignalRecord(Record):
    """What `kmixer lab signal` prints as JSON: what of it a figure needs."""

    name: str
    trained: bool
    positions: Count
    curves: Annotated[list[SignalCurve], Field(min_length=1)]
    recipe_sha256: str | None = None
    weights_sha256: str | None = None


def identity_of(run: RunFolder) -> dict[str, str]:
    """What says of which run, and of which of its weights, a measurement is."""
    return {"recipe_sha256": run.identity(), "weights_sha256": read_header(run.path / WEIGHTS)[1]}


def save_signal(run: RunFolder, measured: dict[str, Any]) -> Path:
    """Write a measurement into the folder of its run, at once; where it is."""
    path = run.path / LAB_SIGNAL
    write_json(path, measured)
    return path


def read_signal(run: RunFolder) -> SignalRecord | None:
    """The measurement in a run folder; None where there is none.

    Raises InputError, one line, where the file is something else, or of other weights than the run's.
    """
    path = run.path / LAB_SIGNAL
    if not is_there(path):
        return None
    try:
        record = SignalRecord.parse(read_json(path), source="")
    except InputError as error:
        problem = str(error).removeprefix(": ").removesuffix("; restore it from a copy")
        raise InputError(f"{path} holds no measurement ({problem}); {_again(run)}") from None
    known = {"recipe_sha256": run.identity()}
    if is_there(run.path / WEIGHTS):  # records of runs are kept without
        known = identity_of(run)
    if any(getattr(record, name) != digest for name, digest in known.items()):
        raise InputError(f"{path} is of another run, or of weights that the run had before; {_again(run)}")
    return record


def _again(run: RunFolder) -> str:
    return f"kmixer lab signal {run.path} --save measures again, or remove it"
