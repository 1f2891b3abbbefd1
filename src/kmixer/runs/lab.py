"""What `kmixer lab` leaves in a run folder: checked where it is read, and known to be of this run's weights.

It is no file of the run's own: nothing that reads, packs or replaces a run looks at it, and a report draws it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, TypeVar

from pydantic import Field, model_validator

from kmixer.errors import InputError
from kmixer.files import is_there, read_json, write_json
from kmixer.models.model_folder import WEIGHTS
from kmixer.runs import integrity
from kmixer.runs.record_types import Count, Number, Record
from kmixer.runs.run_folder import RunFolder
from kmixer.tensor_files import read_header

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


class LabResult(Record):
    """What a command of the lab prints as JSON: what of it a figure needs."""

    panel: ClassVar[str]  # of `kmixer lab`

    name: str
    recipe_sha256: str | None = None
    weights_sha256: str | None = None


class LabRecord(LabResult):
    """Of a model's layers."""

    trained: bool
    positions: Count


class SignalRecord(LabRecord):
    """Of `kmixer lab signal`."""

    panel = "signal"

    curves: Annotated[list[SignalCurve], Field(min_length=1)]


Cosines = Annotated[list[Number], Field(min_length=2)]


class OverlapCurve(Record):
    """One model, or several initialisations of it, layer by layer: l = 0 to L."""

    name: str
    overlap: Cosines
    overlap_error: Cosines
    across: Cosines
    groups: dict[str, Cosines]  # excess, by group of positions
    theory: Cosines | None = None
    fresh: OverlapCurve | None = None  # of a run: initialisations of its recipe on the same inputs

    @model_validator(mode="after")
    def _fits(self) -> Self:
        layers = {"overlap_error": self.overlap_error, "across": self.across, "theory": self.theory, **self.groups}
        if self.fresh is not None:
            layers["fresh"] = self.fresh.overlap
        for name, values in layers.items():
            if values is not None and len(values) != len(self.overlap):
                raise ValueError(f"{name}: it has another length than overlap")
        return self


class OverlapRecord(LabRecord):
    """Of `kmixer lab overlap`."""

    panel = "overlap"

    curves: Annotated[list[OverlapCurve], Field(min_length=1)]


Panel = TypeVar("Panel", bound=LabResult)


def identity_of(run: RunFolder) -> dict[str, str]:
    """What says of which run, and of which of its weights, a measurement is."""
    return {"recipe_sha256": run.identity(), "weights_sha256": read_header(run.path / WEIGHTS)[1]}


def lab_file(run: RunFolder, panel: str) -> Path:
    """Where a measurement of a command of the lab lies."""
    return run.path / f"lab-{panel}.json"


def save_measurement(run: RunFolder, panel: str, measured: dict[str, Any]) -> Path:
    """Write a measurement into the folder of its run, at once; where it is."""
    path = lab_file(run, panel)
    write_json(path, integrity.with_digest(measured))
    return path


def read_measurement(run: RunFolder, kind: type[Panel]) -> Panel | None:
    """The measurement of a kind in a run folder; None where there is none.

    Raises InputError, one line, where the file is something else, was changed, or is of other weights than the run's.
    """
    path, again = lab_file(run, kind.panel), f"kmixer lab {kind.panel} {run.path} --save measures again, or remove it"
    if not is_there(path):
        return None
    try:
        measured = read_json(path)
        record = kind.parse(measured, source="")
    except InputError as error:
        problem = str(error).removeprefix(": ").removeprefix(f"{path} ").removesuffix("; restore it from a copy")
        raise InputError(f"{path} holds no measurement ({problem}); {again}") from None
    if integrity.OWN_DIGEST in measured and not integrity.is_whole(measured):
        raise InputError(f"{path} was changed after it was measured; {again}")
    known = {"recipe_sha256": run.identity()}
    if is_there(run.path / WEIGHTS):  # records of runs are kept without
        known = identity_of(run)
    if any(getattr(record, name) != digest for name, digest in known.items()):
        raise InputError(f"{path} is of another run, or of weights that the run had before; {again}")
    return record
