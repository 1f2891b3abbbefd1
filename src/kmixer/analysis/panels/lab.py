"""What the panels of `kmixer lab` share: they draw what a command has left in the folder of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from matplotlib.figure import Figure

from kmixer.analysis.panels.drawing import ArmPanel, label_of
from kmixer.experiments.arms import Arm
from kmixer.runs.lab import LabRecord, LabResult, read_measurement

Record = TypeVar("Record", bound=LabResult)


def title_of(what: str, record: LabRecord) -> str:
    """Of a figure, whose record has a name that is fit for one: see `label_of`."""
    state = "trained" if record.trained else "at initialisation"
    return f"{what}, {record.name} {state}, {record.positions} positions"


def labelled(record: Record) -> Record:
    """With a name that is fit for a figure."""
    return record.model_copy(update={"name": label_of(record.name)})


def panel_of(kind: type[Record], draw: Callable[[Record], Figure], caption: str) -> ArmPanel:
    """The panel of a command, for the first run of an arm where that has been measured."""

    def draw_of_arm(arm: Arm) -> Figure:
        record = read_measurement(arm.begun[0], kind)
        assert record is not None
        return draw(record.model_copy(update={"name": arm.name}))

    return ArmPanel(
        name=kind.panel,
        caption=f"First seed, best weights, measured by kmixer lab {kind.panel}: {caption}",
        applies=lambda arm: read_measurement(arm.begun[0], kind) is not None,
        draw=draw_of_arm,
    )
