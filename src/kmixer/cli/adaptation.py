"""What `kmixer eval` was asked about fast weights, and how it says so."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kmixer.errors import InputError
from kmixer.language_model import LanguageModel
from kmixer.layers.adapting import adapting
from kmixer.measure.evaluation import stretch_edges
from kmixer.measure.fast_weights import Moves, check_fast


@dataclass(frozen=True)
class Adaptation:
    """Whether fast weights learn, and after how many tokens they begin anew; None leaves what the model has."""

    on: bool
    reset_every: int | None

    def __post_init__(self) -> None:
        if self.reset_every is not None and self.reset_every < 1:
            raise InputError(f"--reset-every: got {self.reset_every}; allowed: 1 token or more")
        if not self.on and self.reset_every is not None:
            raise InputError("--reset-every is of weights that adapt, and --adapt off stops them; give one of them")

    @property
    def asked(self) -> bool:
        """Whether anything but the default was asked for."""
        return not self.on or self.reset_every is not None

    def said(self, documents: bool = False) -> str:
        """The options that were given."""
        options = (
            ("--adapt", not self.on),
            ("--reset-every", self.reset_every is not None),
            ("--documents", documents),
        )
        return ", ".join(option for option, given in options if given)

    @contextlib.contextmanager
    def applied(self, model: LanguageModel) -> Iterator[Moves | None]:
        """For the time of the block the model adapts so; what is to be told of a stream, None without fast weights.

        Raises InputError for a model without fast weights, of which anything was asked.
        """
        if self.asked:
            check_fast(model, self.said())
        with adapting(model, self.on, self.reset_every):
            yield Moves(model) if self.matters(model) else None

    @staticmethod
    def matters(model: LanguageModel) -> bool:
        """Whether the model has fast weights."""
        return model.config.fast_weights is not None

    def interval(self, model: LanguageModel) -> int | None:
        """After how many tokens the weights of the model begin anew."""
        fast = model.config.fast_weights
        return self.reset_every or (None if fast is None else fast.reset_every)

    def to_json(self, model: LanguageModel) -> dict[str, Any]:
        """For the figures as JSON; nothing for a model without fast weights."""
        if not self.matters(model):
            return {}
        return {"adapt": "on" if self.on else "off", "reset_every": self.interval(model) if self.on else None}

    def words(self, model: LanguageModel) -> str:
        """For the line of what was measured."""
        if not self.matters(model):
            return ""
        if not self.on:
            return ", not adapting"
        interval = self.interval(model)
        return ", adapting" + ("" if interval is None else f", reset every {interval:,} tokens")


def named_stretches(losses: list[float], longest: int) -> list[tuple[str, float]]:
    """Losses of stretches that double in length, with their positions: 1, 2, 3-4, 5-8, ..., as far as any goes."""
    edges = itertools.pairwise(stretch_edges(longest))
    names = [str(last) if last == before + 1 else f"{before + 1}-{last}" for before, last in edges]
    return list(zip(names, losses, strict=True))
