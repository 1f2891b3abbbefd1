"""TensorBoard: event files below OUT/tensorboard, a folder a run; `tensorboard --logdir OUT/tensorboard` shows them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

EVENTS = "events.out.tfevents.*"


class TensorBoard:
    """A `Tracker`. A step is on the disk when `log` returns."""

    def __init__(self, out: Path) -> None:
        self._out = out / "tensorboard"

    def begin(self, name: str, config: Mapping[str, Any], step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = self._out / name
        there = any(folder.glob(EVENTS))
        self._shown = step if there else None  # the last step that stays as it was shown
        first = 0 if self._shown is None else self._shown + 1
        self._writer = SummaryWriter(str(folder), purge_step=first)
        if self._shown is None:
            rows = "".join(f"| {key} | {value} |\n" for key, value in config.items())
            self._writer.add_text("recipe", f"| key | value |\n|---|---|\n{rows}", 0)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if self._shown is not None and step <= self._shown:
            return
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def end(self) -> None:
        self._writer.close()


def open_tracker(out: Path) -> TensorBoard:
    return TensorBoard(out)
