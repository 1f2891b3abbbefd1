"""wandb: offline below OUT/wandb, to be sent by `wandb sync`, or online where WANDB_MODE says so."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PROJECT = "kmixer"
# Keys of a recipe that a run may be resumed with another value of.
MAY_CHANGE = ("data.corpus", "data.dataset", "description")


class Wandb:
    """A `Tracker`. A run keeps its id when it is resumed, so that wandb knows it again."""

    def __init__(self, out: Path) -> None:
        self._out = out

    def begin(self, name: str, config: Mapping[str, Any], step: int | None) -> None:
        import wandb

        self._out.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=PROJECT,
            name=name,
            id=id_of(name, config),
            config=dict(config),
            dir=str(self._out),
            mode=os.environ.get("WANDB_MODE", "offline"),
            resume="allow",
            reinit="create_new",
            settings=wandb.Settings(console="off", silent=True),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if step >= self._run.starting_step:  # what is before is there
            self._run.log(dict(values), step=step)

    def end(self) -> None:
        self._run.finish()


def id_of(name: str, config: Mapping[str, Any]) -> str:
    """What wandb knows a run by: the same for the same name and recipe."""
    known = {key: value for key, value in config.items() if key not in MAY_CHANGE}
    return hashlib.sha256(json.dumps([name, known], sort_keys=True).encode()).hexdigest()[:16]


def open_tracker(out: Path) -> Wandb:
    return Wandb(out)
