"""One run of training: a step after another, evaluations and checkpoints in between, whatever the task."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kmixer.errors import DivergedError
from kmixer.models.model_folder import Model
from kmixer.runs import integrity
from kmixer.runs.placement import Placement
from kmixer.training.averaging import WeightAverage
from kmixer.training.checkpoint import Progress, save_checkpoint, seed_step
from kmixer.training.distributed import Processes, pieces_of
from kmixer.training.matmul_precision import fast_exact_matmuls
from kmixer.training.optimizers import learning_rate_factor, norms_by_group, set_learning_rates
from kmixer.training.process import interrupts
from kmixer.training.results import write_results
from kmixer.training.task import Measured, Task


class Reporter:
    """What training tells while it runs. This one keeps silent."""

    def begun_from(self, source: Path, fresh: Sequence[str], changed: Sequence[str]) -> None:
        """A new run begins with the weights of another, but for fresh tensors; `changed` are settings of the model."""

    def warned(self, line: str) -> None:
        """Something of the run that begins is likely not what was wanted."""

    def started(self, task: Task, run: Path, parameters: int, step: int) -> None:
        """Training begins after `step` steps."""

    def trained(self, step: int, loss: float, units_per_second: float, seconds_left: float) -> None:
        """A step was made."""

    def evaluated(self, step: int, measured: Sequence[Measured], is_best: bool) -> None:
        """The validation part was evaluated."""

    def recorded(self, line: dict[str, Any]) -> None:
        """A line was added to metrics.jsonl."""


@dataclass(frozen=True)
class Result:
    """How training ended."""

    run: Path
    step: int
    finished: bool  # False: interrupted
    best: dict[str, Any]  # {"step", "loss"} on the validation part, by the first protocol
    seconds: float
    is_main_process: bool = True
    saved: bool = True  # False: interrupted before the first evaluation, and the run that was there is as it was


class Trainer:
    """The parts of a run that every step needs."""

    def __init__(
        self,
        task: Task,
        placement: Placement,
        model: Model,
        optimizers: list[Optimizer],
        average: WeightAverage | None,
        progress: Progress,
        processes: Processes,
        reporter: Reporter,
    ) -> None:
        self.task, self.config = task, task.recipe.training
        self.placement, self.processes = placement, processes
        self.model, self.optimizers, self.average, self.progress = model, optimizers, average, progress
        self.reporter = reporter if processes.is_main else Reporter()
        self.network = processes.prepare(model)
        task.to(processes.device)
        self.generator = torch.Generator(processes.device)
        self.norms: dict[str, dict[str, float]] = {}  # of the last step before an evaluation, by group
        self.training_seconds = 0.0  # of this session, without evaluations
        self.steps_made = 0
        self.evaluated_after = 0  # steps

    def run_to_the_end(self) -> Result:
        progress, config = self.progress, self.config
        parameters = sum(p.numel() for p in self.model.parameters())
        self.reporter.started(self.task, self.placement.target.path, parameters, progress.step)
        with interrupts() as interrupted, fast_exact_matmuls(self.processes.device):
            if progress.best is None:
                self._evaluate()
            while progress.step < config.steps and not self.processes.any(bool(interrupted)):
                self._step()
                if self._is_evaluated(progress.step):
                    self._evaluate()
            if progress.step < config.steps:
                self._check_weights()
                self._checkpoint()
        assert progress.best is not None
        finished = progress.step == config.steps
        if finished and self.processes.is_main:
            with self._kept_weights():
                write_results(self.placement.folder, self.model, self.task, progress)
        self.processes.wait()
        return Result(
            self.placement.target.path,
            progress.step,
            finished,
            progress.best,
            progress.seconds,
            self.processes.is_main,
            self.placement.published,
        )

    def _check_weights(self) -> None:
        """Raises DivergedError where the last step, which no evaluation has seen, made weights that are not finite."""
        trained = (parameter for parameter in self.model.parameters() if parameter.requires_grad)
        if not all(bool(parameter.isfinite().all()) for parameter in trained):
            raise DivergedError(
                f"step {self.progress.step}: weights are not finite; training stopped. {self.placement.keeps()}"
            )

    def _is_evaluated(self, step: int) -> bool:
        return step % self.config.evaluate_every == 0 or step == self.config.steps

    def _step(self) -> None:
        config, progress = self.config, self.progress
        began = time.perf_counter()
        step = progress.step + 1
        factor = learning_rate_factor(step, config)
        set_learning_rates(self.optimizers, factor)
        seed_step(self.generator, config.seed, step, self.processes.rank)
        loss = self._backward()
        recorded = self._is_evaluated(step)
        if recorded:
            self.norms["gradient_norms"] = norms_by_group(self.model, lambda _, parameter: parameter.grad)
            before = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        mean_loss = float(self.processes.mean(loss))
        if not (math.isfinite(mean_loss) and bool(torch.isfinite(norm))):
            raise DivergedError(
                f"step {step}: loss {mean_loss}, gradient norm {float(norm)}; training stopped; "
                f"try a lower training.learning_rate or a longer training.warmup_steps. {self.placement.keeps()}"
            )
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if recorded:
            self.norms["update_norms"] = norms_by_group(self.model, lambda name, parameter: parameter - before[name])

        if self.average is not None:
            self.average.update(step)

        progress.step = step
        progress.loss_sum += mean_loss
        progress.loss_count += 1
        self.steps_made += 1
        spent = time.perf_counter() - began
        self.training_seconds += spent
        progress.seconds += spent
        rate = self.steps_made * self.task.recipe.units_per_step / self.training_seconds
        if step % config.log_every == 0:
            self._log(factor, float(norm), rate)
        left = (config.steps - step) * self.training_seconds / self.steps_made
        self.reporter.trained(step, mean_loss, rate, left)

    def _backward(self) -> Tensor:
        """Add the gradients of one batch; its mean loss over this process's share."""
        config = self.config
        pieces = pieces_of(self.task.batch(self.generator), self.processes, config.accumulation)
        device = self.processes.device
        total = torch.zeros((), device=device, dtype=torch.float64)
        for index, (inputs, targets) in enumerate(pieces):
            last = index == len(pieces) - 1
            with contextlib.nullcontext() if last else self.processes.without_exchange(self.network):
                with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
                    loss = self.task.loss(self.network, inputs, targets) / len(pieces)
                loss.backward()
            total += loss.detach()
        return total

    def _log(self, factor: float, norm: float, rate: float) -> None:
        progress, config = self.progress, self.config
        if self.processes.is_main:
            self._record(
                {
                    "step": progress.step,
                    self.task.unit: progress.step * self.task.recipe.units_per_step,
                    "train_loss": progress.loss_sum / progress.loss_count,
                    "learning_rate": config.learning_rate * factor,
                    "gradient_norm": norm,
                    "seconds": progress.seconds,
                    f"{self.task.unit}_per_second": rate,
                }
            )
        progress.loss_sum, progress.loss_count = 0.0, 0

    def _record(self, line: dict[str, Any]) -> None:
        self.placement.folder.append_metrics(line)
        self.reporter.recorded(line)

    def _kept_weights(self) -> contextlib.AbstractContextManager[None]:
        """Within it the model has the weights that are evaluated and kept: its own, or their average."""
        return contextlib.nullcontext() if self.average is None else self.average.applied()

    def _evaluate(self) -> None:
        """Measure the validation loss by every protocol, keep the best weights, and write a checkpoint."""
        with self._kept_weights():
            measured, is_best = self._measure()
        self.evaluated_after = self.progress.step
        self._checkpoint()
        self.reporter.evaluated(self.progress.step, measured, is_best)

    def _measure(self) -> tuple[Sequence[Measured], bool]:
        progress = self.progress
        began = time.perf_counter()
        measured = self.task.evaluate(self.model)
        loss = measured[0].loss
        if not math.isfinite(loss):
            raise DivergedError(
                f"step {progress.step}: validation loss {loss}; training stopped. {self.placement.keeps()}"
            )
        is_best = progress.best is None or loss < progress.best["loss"]
        if is_best:
            progress.best = {"step": progress.step, "loss": loss}
        progress.seconds += time.perf_counter() - began
        if self.processes.is_main:
            figures = [measure.to_json() for measure in measured]
            dynamics = self.task.dynamics(self.model)
            line = {"step": progress.step, "validation": figures, "dynamics": dynamics, **self.norms}
            self._record({**line, "seconds": progress.seconds})
            if is_best:
                about = {
                    "recipe": self.task.recipe.name,
                    "step": progress.step,
                    "validation": figures,
                    "corpus_sha256": progress.corpus_sha256,
                    integrity.RUN: progress.recipe_sha256,
                }
                self.task.save_weights(self.placement.folder.path, self.model, about)
        return measured, is_best

    def _checkpoint(self) -> None:
        if self.processes.is_main:
            save_checkpoint(self.placement.folder, self.model, self.optimizers, self.progress, self.average)
            self.placement.saved(evaluated_after=self.evaluated_after)
