"""Time a token against the length of the window: a training step of equal size at every length."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from kmixer.bench.models import ModelName, TrainingSpeed, bench_train
from kmixer.runs.recipe import LanguageRecipe

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LENGTHS = tuple(2**power for power in range(6, 17))
# What is timed: the model, and the settings of the recipe that make it so.
SERIES: dict[str, tuple[ModelName, list[str]]] = {
    "K-Operators": ("recipe", []),
    "K-Operators, recurrent": ("recipe", ["model.decay.backend=recurrent"]),
    "K-Operators, mask": ("recipe", ["model.decay.backend=mask"]),
    "transformer": ("transformer", []),
}


@dataclass(frozen=True)
class LengthSpeed:
    """Training steps of one series at one length of the window."""

    series: str
    speed: TrainingSpeed

    def to_json(self) -> dict[str, Any]:
        """The speed without its part of a roof, which is not measured here."""
        speed = asdict(self.speed)
        del speed["part_of_roof"]
        return {"series": self.series, **speed}


def bench_length(
    load: Callable[[list[str]], LanguageRecipe],
    tokens: int,
    longest_step: float,
    repeats: int,
    lengths: tuple[int, ...],
) -> Iterator[LengthSpeed]:
    """Training of every series at windows of each length, in batches of `tokens` tokens.

    A series ends after a first step of more than `longest_step` seconds: longer windows take longer.
    """
    for name, (model, settings) in SERIES.items():
        for length in lengths:
            batch = [f"training.window={length}", f"training.batch_size={max(1, tokens // length)}"]
            speed = bench_train(load([*settings, *batch]), model, "float32", repeats, longest=longest_step)
            yield LengthSpeed(name, speed)
            if speed.first_call_seconds > longest_step:
                break


def draw_length(rows: list[LengthSpeed]) -> Figure:
    """Microseconds per token against the length, one line a series."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name in dict.fromkeys(row.series for row in rows):
        points = [(row.speed.window, 1e6 / row.speed.tokens_per_second) for row in rows if row.series == name]
        x, y = zip(*points, strict=True)
        axes.plot(x, y, marker="o", markersize=4, label=name)
    windows = sorted({row.speed.window for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(windows[::2], [f"{window:,}" for window in windows[::2]])
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("tokens of the window")
    axes.set_ylabel("microseconds per trained token")
    axes.set_title(f"Training step, {rows[0].speed.batch_size * rows[0].speed.window:,} tokens per step", loc="left")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
