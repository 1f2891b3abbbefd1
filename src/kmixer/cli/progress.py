"""How training shows itself: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from kmixer.data.token_files import Dataset
from kmixer.training.evaluation import Evaluation
from kmixer.training.loop import Reporter
from kmixer.training.recipe import Recipe

SECONDS_BETWEEN_LINES = 10.0


class TerminalReporter(Reporter):
    """Prints evaluations as lines, and progress as a live bar or as a line every ten seconds."""

    def __init__(self) -> None:
        self.live = sys.stdout.isatty()
        self.bar = Progress(
            TextColumn("step {task.completed:>6.0f}/{task.total:.0f}"),
            BarColumn(),
            TextColumn("{task.description}"),
            console=Console(highlight=False),
            transient=True,
            disable=not self.live,
        )
        self.task: TaskID | None = None
        self.steps = 0
        self.last_line = time.monotonic()

    def __enter__(self) -> TerminalReporter:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def started(self, recipe: Recipe, run: Path, dataset: Dataset, parameters: int, step: int) -> None:
        config = recipe.training
        self.steps = config.steps
        self.task = self.bar.add_task("", total=config.steps, completed=step)
        self._print(f"{recipe.name}: {parameters:,} parameters, vocabulary {recipe.tokenizer.vocabulary_size}")
        self._print(
            f"{recipe.data.corpus}: {len(dataset.train.tokens):,} training tokens, "
            f"{len(dataset.validation.tokens):,} validation tokens"
        )
        self._print(
            f"{config.steps:,} steps of {config.batch_size} x {config.window} tokens, {config.optimizer}, "
            f"{config.precision}, seed {config.seed}; run folder {run}"
            + (f"; resuming after step {step}" if step else "")
        )

    def trained(self, step: int, loss: float, tokens_per_second: float, seconds_left: float) -> None:
        text = f"loss {loss:.3f}  {tokens_per_second:,.0f} tokens/s  {_duration(seconds_left)} left"
        if self.live:
            assert self.task is not None
            self.bar.update(self.task, completed=step, description=text)
        elif time.monotonic() - self.last_line >= SECONDS_BETWEEN_LINES:
            self.last_line = time.monotonic()
            self._print(f"step {step:>6}/{self.steps}  {text}")

    def evaluated(self, step: int, evaluations: list[Evaluation], is_best: bool) -> None:
        figures = "  ".join(
            f"validation ({e.protocol}) {e.loss:.4f} nats, {e.bits_per_byte:.4f} bits/byte" for e in evaluations
        )
        self._print(f"step {step:>6}/{self.steps}  {figures}{'  best so far' if is_best else ''}")

    def _print(self, text: str) -> None:
        if self.live:
            self.bar.console.print(text, markup=False)
        else:
            print(text, flush=True)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
